"""The container definitions in docs/container, as far as they can be checked without a builder and its network."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mae_scale.packaged import packaged

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "container"


def dockerfile() -> tuple[str, dict[str, str], list[str]]:
    """The base image, {destination: source} of what is copied, and the commands."""
    text = (FOLDER / "Dockerfile").read_text()
    copied = {}
    for line in re.findall(r"^COPY (.+)$", text, re.M):
        *sources, target = line.split()
        copied |= {target + Path(source).name if target.endswith("/") else target: source for source in sources}
    return re.search(r"^FROM (.+)$", text, re.M)[1], copied, re.findall(r"^RUN (.+)$", text, re.M)


def apptainer() -> tuple[str, dict[str, str], list[str]]:
    """The same of the Apptainer definition."""
    text = (FOLDER / "mae-scale.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n((?: +.+\n)+)", text, re.M))
    copied = {line.split()[1]: line.split()[0] for line in sections["files"].splitlines()}
    return re.search(r"^From: (.+)$", text, re.M)[1], copied, [line.strip() for line in sections["post"].splitlines()]


def test_both_definitions_take_the_same_steps_with_the_locked_versions():
    assert dockerfile() == apptainer()
    base, copied, commands = dockerfile()
    assert re.match(r"python:3\.1[012]-", base)
    lock = next(target for target, source in copied.items() if source == "requirements.lock")
    assert any(f"--requirement {lock}" in command for command in commands)
    assert "--no-deps" in commands[-1]


@pytest.mark.parametrize("definition", [dockerfile, apptainer])
def test_what_is_copied_is_there_and_is_enough_for_the_last_step(definition, tmp_path):
    _, copied, commands = definition()
    inside = commands[-1].split()[-1]
    for target, source in copied.items():
        path = tmp_path / target.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, path, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, path)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*wheel, tmp_path / inside.lstrip("/")], check=True, timeout=120, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"mae_scale/slurm/{path.name}" for path in packaged("slurm").glob("*.s*")} <= set(names)
    assert "mae_scale/recipes/demo.yaml" in names
