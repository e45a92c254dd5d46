"""Shared fixtures: the digits as JPEGs, and the command as a user calls it."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from data_pipeline.samples import write_digits
from mae_scale.cli.main import main
from mae_scale.distributed import stop_requests
from tests import warm

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's digits: train/ and val/, ten classes."""
    root = tmp_path_factory.mktemp("data") / "digits"
    write_digits(root)
    return root


@pytest.fixture(scope="session")
def mae_scale():
    """Call `mae-scale ARGUMENTS`; the finished process, with text output. cold: all is imported anew, as for a user."""

    def call(*arguments, timeout: float = 240, cold: bool = False, **environment: str) -> subprocess.CompletedProcess:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MLFLOW_", "RANK"))}
        return warm.run(
            [sys.executable, "-m", "mae_scale", *map(str, arguments)],
            env={**clean, "COLUMNS": "120", **environment},
            timeout=timeout,
            cold=cold,
        )

    return call


@pytest.fixture
def call(monkeypatch, capsys):
    """Call `mae-scale ARGUMENTS` in this process; (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "160")
        monkeypatch.setattr(stop_requests, "listen", lambda: None)  # signals are the test runner's
        monkeypatch.setattr("mae_scale.cli.main.leave", sys.exit)  # a rank would end the test runner, with its own code
        monkeypatch.setattr(sys, "argv", ["mae-scale", *map(str, arguments)])
        with patch.dict(os.environ), pytest.raises(SystemExit) as ended:
            main()
        if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
            sys.modules["torch"].distributed.destroy_process_group()
            pytest.fail("the command joined a process group, which an error leaves open here: use mae_scale")
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run
