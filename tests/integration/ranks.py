"""Running a worker script of the tests as several ranks that start warm, and the DeepSpeed files of its cases."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

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


def run_worker(worker: Path, cases: dict, nproc: int, folder: Path) -> dict:
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
        deadline = time.monotonic() + TIMEOUT_S
        while any(process.poll() is None for process in ranks):
            failed = [log for process, log in zip(ranks, logs, strict=True) if process.poll()]
            assert not failed, failed[0].read_text()[-6000:]
            assert time.monotonic() < deadline, "the ranks have not ended"
            time.sleep(0.02)
    assert not any(process.returncode for process in ranks), [log.read_text()[-3000:] for log in logs]
    return json.loads((folder / "out.json").read_text())
