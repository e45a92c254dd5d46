"""An installed copy: wheel and sdist built from the source, installed into a fresh environment, used from elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import mae_scale as package
from mae_scale.packaged import packaged
from tests.tiny import arguments as tiny_arguments

ROOT = Path(package.__file__).parents[1]
SOURCE = ("mae_scale", "data_pipeline", "ds_configs", "slurm", "tests", "bench")
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
PIP_OFFLINE = ("--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation", "--quiet")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the source, with a compiled module: a build leaves its folders there, and takes up those it finds."""
    folder = tmp_path_factory.mktemp("source") / "mae-scale"
    for name in SOURCE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "mae_scale" / "__pycache__").mkdir()
    (folder / "mae_scale" / "__pycache__" / "cli.cpython-399.pyc").touch()
    return folder


@pytest.fixture(scope="module")
def sdist(source) -> Path:
    done(sys.executable, "-c", BUILD_SDIST, source.parent, cwd=source)
    return next(source.parent.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(source) -> Path:
    done(sys.executable, "-m", "pip", "wheel", *PIP_OFFLINE, "-w", source.parent, source)
    return next(source.parent.glob("*.whl"))


class Environment:
    """A fresh virtual environment with one thing installed; what that needs is seen in the tests' own environment."""

    def __init__(self, folder: Path, installed: Path):
        self.prefix, self.elsewhere = folder / "venv", folder / "elsewhere"
        self.elsewhere.mkdir(parents=True)
        done(sys.executable, "-m", "venv", self.prefix)
        paths = {"base": str(self.prefix), "platbase": str(self.prefix)}
        self.site = Path(sysconfig.get_path("purelib", vars=paths))
        # A folder named in a .pth file is searched last, and .pth files in it, such as that of `pip install -e`, are
        # not read: of mae-scale itself the environment has what is installed into it.
        (self.site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (self.prefix / "bin" / "ninja").symlink_to(Path(sys.executable).with_name("ninja"))
        self.call("python", "-m", "pip", "install", "--ignore-installed", *PIP_OFFLINE, installed)
        (self.site / "slurm").mkdir()
        (self.site / "slurm" / "__init__.py").write_text("another's package of this name")

    def call(self, program: str, *arguments, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        """Run one of its programs from another folder, without the source in sight."""
        mine = ("PYTHONPATH", "VIRTUAL_ENV", "MLFLOW_", "SLURM_", "SBATCH_", "MAE_SCALE_", "RANK")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(mine)}
        environment = {"COLUMNS": "160", **environment}
        command = (self.prefix / "bin" / program, *arguments)
        return done(*command, check=check, cwd=self.elsewhere, env={**clean, **environment})


@pytest.fixture(scope="module")
def installed(tmp_path_factory, sdist) -> Environment:
    """An environment with what `pip install SDIST` gives: a wheel is built on the way."""
    return Environment(tmp_path_factory.mktemp("installed"), sdist)


def done(*command, check: bool = True, **how) -> subprocess.CompletedProcess:
    finished = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=240, **how)
    assert not check or finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def test_the_wheel_has_every_file_that_is_data_and_no_folder_that_is_not_ours(wheel):
    archive = zipfile.ZipFile(wheel)
    names = {name for name in archive.namelist() if ".dist-info/" not in name}
    for folder, inside, pattern in (
        ("mae_scale/recipes", "mae_scale/recipes", "**/*.yaml"),
        ("ds_configs", "mae_scale/ds_configs", "*.json"),
        ("slurm", "mae_scale/slurm", "*.s*"),
        ("mae_scale/reports/page_files", "mae_scale/reports/page_files", "*"),
    ):
        expected = {f"{inside}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).glob(pattern)}
        assert expected
        assert expected <= names
    assert {name.split("/")[0] for name in names} == {"mae_scale", "data_pipeline"}
    assert {"mae_scale/py.typed", "data_pipeline/py.typed"} <= names
    page = {".html", ".css", ".js", ".txt"}
    assert {Path(name).suffix for name in names} == {".py", ".yaml", ".json", ".sbatch", ".sh", ".typed"} | page
    assert not [name for name in names if "test" in name or "__pycache__" in name]


def test_a_wheel_made_from_the_sdist_is_the_wheel(installed, wheel):
    made = {
        str(p.relative_to(installed.site)): p.read_bytes()
        for name in ("mae_scale", "data_pipeline")
        for p in (installed.site / name).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    archive = zipfile.ZipFile(wheel)
    assert made == {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def test_the_sdist_has_the_versions_tested_together(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"requirements.lock", "slurm/environment.sh", "ds_configs/zero2.json", "setup.py"} <= names
    assert not [name for name in names if name.startswith("tests") or "__pycache__" in name]


def test_the_metadata_say_the_version_of_the_code_and_the_choice_of_cuda(wheel):
    archive = zipfile.ZipFile(wheel)
    (path,) = [name for name in archive.namelist() if name.endswith("dist-info/METADATA")]
    said = message_from_string(archive.read(path).decode())
    assert said["Version"] == package.__version__
    assert package.__version__ in wheel.name
    assert {"cuda12", "cuda13", "docs", "test"} <= set(said.get_all("Provides-Extra"))
    dali = [need.split(";") for need in said.get_all("Requires-Dist") if need.startswith("nvidia-dali")]
    chosen = {need.split(">")[0].strip(): extra for need, extra in dali}
    assert chosen.keys() == {"nvidia-dali-cuda120", "nvidia-dali-cuda130"}
    assert all(f"cuda{name[-3:-1]}" in extra for name, extra in chosen.items())
    # Once: what is written in the code.
    assert package.__version__ not in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize("kind", ["sdist", pytest.param("wheel", marks=pytest.mark.slow)])
def test_it_installs_and_leaves_the_names_slurm_and_ds_configs_to_others(kind, installed, wheel, tmp_path):
    """And its command runs; what it needs is there in the versions that it asks for."""
    fresh = installed if kind == "sdist" else Environment(tmp_path, wheel)
    said = fresh.call("mae-scale", "--help").stdout
    assert "pretrain" in said
    assert "submit" in said
    find = "from importlib.util import find_spec as f; print(f('slurm').origin, f('ds_configs'), f('mae_scale').origin)"
    found = fresh.call("python", "-c", find).stdout.split()
    assert found == [f"{fresh.site}/slurm/__init__.py", "None", f"{fresh.site}/mae_scale/__init__.py"]
    checked = fresh.call("python", "-m", "pip", "check", check=False).stdout
    assert "mae-scale" not in checked


@pytest.mark.slow
def test_it_trains_from_another_folder_with_the_packaged_recipe_and_deepspeed_file_and_compiles_nothing(
    installed, digits, tmp_path
):
    wanted = tiny_arguments(digits, "schedule.stop_after_steps=3", "engine.zero_stage=2")
    installed.call(
        "mae-scale",
        "pretrain",
        "demo",
        "--out",
        "run",
        "--tracking-uri",
        "off",
        *wanted,
        TORCH_EXTENSIONS_DIR=str(tmp_path),
    )
    assert list(tmp_path.iterdir()) == []
    run = installed.elsewhere / "run"
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 1
    assert json.loads((run / "engine.json").read_text())["zero_optimization"]["stage"] == 2


@pytest.mark.slow
def test_submit_shows_and_writes_what_sbatch_needs(installed, tmp_path):
    chain = ["submit", "pretrain/vit_huge_1600ep", "finetune/vit_huge_224", "--nodes", 16, "--out", "runs"]
    chain += ["data.root=/d", "data.val_root=/v"]
    bin = tmp_path / "bin"
    bin.mkdir()
    shown = installed.call("mae-scale", *chain, "--dry-run", PATH=only(bin, "bash", "dirname")).stdout
    assert shown.count("#SBATCH --gpus-per-node=8") == 2
    assert not (installed.elsewhere / "runs").exists()
    for name, says in (("sinfo", "part* 16"), ("sbatch", "7")):
        (bin / name).write_text(f"#!/bin/bash\necho '{says}'\n")
        (bin / name).chmod(0o755)
    installed.call("mae-scale", *chain, PATH=f"{bin}:{os.environ['PATH']}")
    folder = installed.elsewhere / "runs" / "slurm"
    for script in ("1-pretrain-vit_huge_1600ep.sbatch", "2-finetune-vit_huge_224.sbatch"):
        assert f"VIRTUAL_ENV:-{installed.prefix}" in (folder / script).read_text()
    assert (folder / "environment.sh").read_text() == (packaged("slurm") / "environment.sh").read_text()


def only(folder: Path, *programs: str) -> str:
    """A PATH with these programs and no Slurm."""
    for program in programs:
        (folder / program).symlink_to(shutil.which(program))
    return str(folder)


def test_slurm_writes_templates_that_know_their_environment(installed):
    said = installed.call("mae-scale", "slurm", "jobs").stdout
    folder = installed.elsewhere / "jobs"
    assert {p.name for p in folder.iterdir()} == {p.name for p in packaged("slurm").glob("*.*")}
    assert "sbatch --nodes=N jobs/pretrain.sbatch" in said
    say = f"source {folder}/environment.sh; echo $MAE_SCALE_VENV"
    told = done("bash", "-euc", say, env={"PATH": os.environ["PATH"]})
    assert told.stdout.strip() == str(installed.prefix)
