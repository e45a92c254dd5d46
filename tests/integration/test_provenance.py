"""The commit that a run records is that of its own code, or none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

import mae_scale
from tests import warm
from tests.tiny import arguments

pytestmark = pytest.mark.timeout(300)


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=me", "-c", "user.email=me@host", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_an_installed_copy_inside_another_repository_records_no_commit(digits, tmp_path):
    """And one that the repository tracks records its commit."""
    project, site = tmp_path / "project", tmp_path / "project" / "env" / "site-packages"
    code = Path(mae_scale.__file__).parents[1]
    for package in ("mae_scale", "data_pipeline", "ds_configs", "slurm"):
        if (code / package).is_dir():
            shutil.copytree(code / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "README").write_text("the user's own\n")
    git(tmp_path, "init", "--quiet", str(project))
    git(project, "add", "README")
    git(project, "commit", "--quiet", "-m", "first")
    quick = ["engine.backend=fairscale", "engine.zero_stage=1", "schedule.stop_after_steps=1"]

    def start() -> dict[str, str]:
        command = [sys.executable, "-m", "mae_scale", "pretrain", "demo", "--out", "runs/r", *arguments(digits, *quick)]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MLFLOW_", "RANK", "GIT_"))}
        environment = clean | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
        done = warm.run(command, cwd=project, env=environment, timeout=240)
        assert done.returncode == 0, done.stderr
        run_id = json.loads((project / "runs" / "r" / "mlflow.json").read_text())["run_id"]
        return MlflowClient(f"sqlite:///{project}/runs/mlflow.db").get_run(run_id).data.tags

    tags = start()
    assert tags["version.mae-scale"] == mae_scale.__version__
    assert "git_commit" not in tags
    git(project, "add", "env")
    git(project, "commit", "--quiet", "-m", "second")
    assert start()["git_commit"] == git(project, "rev-parse", "HEAD")
