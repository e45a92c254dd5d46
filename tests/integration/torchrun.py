"""Running a worker script of the tests as several ranks, and the DeepSpeed files that its cases name."""

import json
import os
import subprocess
import sys
from pathlib import Path

from mae_scale.packaged import packaged

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
    """Run `worker CASES.json OUT.json` under torchrun as nproc ranks; what it has written."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, str(worker), str(folder / "cases.json"), str(folder / "out.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "out.json").read_text())
