"""Running a worker script of the tests as several ranks that start warm, and the DeepSpeed files of its cases."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable
from pathlib import Path

import pytest

from mae_scale.distributed.ranks import free_port
from mae_scale.packaged import packaged
from tests import warm

TIMEOUT_S = 600


def fully_sharded_configs(folder: Path) -> dict[str, Path]:
    """Copies of the ZeRO 3 files as a user has edited them, by name: here the smallest parameters are sharded too."""
    files = {}
    for name in ("zero3", "zero3_offload"):
        config = json.loads((packaged("ds_configs") / f"{name}.json").read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        files[name] = folder / f"{name}.json"
        files[name].write_text(json.dumps(config))
    return files


def run_worker(worker: Path, cases: dict, nproc: int, folder: Path, *, timeout_s: float = TIMEOUT_S) -> dict:
    """Run `worker CASES.json OUT.json` as nproc ranks; return what it has written. Fails with what a rank has said."""
    (folder / "cases.json").write_text(json.dumps(cases))
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    common = {"WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks, logs = [], [folder / f"rank{rank}.log" for rank in range(nproc)]
    with contextlib.ExitStack() as stack:
        for rank, log in enumerate(logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(nproc), **common}
            process = warm.Popen(
                [sys.executable, str(worker), str(folder / "cases.json"), str(folder / "out.json")],
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path, **place},
                stdout=stack.enter_context(open(log, "wb")),
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            ranks.append(process)
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in ranks):
            failed = [log for process, log in zip(ranks, logs, strict=True) if process.poll()]
            assert not failed, failed[0].read_text()[-6000:]
            assert time.monotonic() < deadline, "the ranks have not ended"
            time.sleep(0.02)
    assert not any(process.returncode for process in ranks), [log.read_text()[-3000:] for log in logs]
    return json.loads((folder / "out.json").read_text())


class OnDemand(dict):
    """Results by case: one that is asked for is run together with its group, so that unselected tests cost nothing."""

    def __init__(self, cases: dict, run: Callable[[dict], dict], group_of: Callable[[str], object]):
        """run: {case: result} of some cases; group_of: of the name of a case."""
        super().__init__()
        self._cases, self._run, self._group_of = cases, run, group_of

    def __missing__(self, name: str):
        group = self._group_of(name)
        self.update(self._run({other: case for other, case in self._cases.items() if self._group_of(other) == group}))
        return self[name]


def quick(values: Iterable, chosen: Container) -> list:
    """Parameters of a test: those that are not chosen are slow."""
    return [value if value in chosen else pytest.param(*_listed(value), marks=pytest.mark.slow) for value in values]


def _listed(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)
