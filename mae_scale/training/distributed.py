"""Ranks: who this process is, the process group, and starting several local ranks without a launcher."""

import contextlib
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from mae_scale.errors import RunError, UsageError

LAUNCHER_VARIABLES = {
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_NTASKS_PER_NODE",
}


@dataclass(frozen=True)
class Ranks:
    """This process among the others of the run."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def launched() -> bool:
    """Whether torchrun, deepspeed or srun has started this process as one rank of several."""
    return "RANK" in os.environ or ("SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ)


def ranks_from_environment() -> Ranks:
    """RANK, WORLD_SIZE, LOCAL_RANK; else Slurm's own variables; else a run of one. Sets what torch needs.

    Raises UsageError when srun gives no address to meet at.
    """
    if "RANK" not in os.environ and launched():
        for name, slurm_name in LAUNCHER_VARIABLES.items():
            if slurm_name in os.environ:
                os.environ[name] = os.environ[slurm_name]
        if "MASTER_ADDR" not in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
            raise UsageError(
                "srun started this rank without MASTER_ADDR; export MASTER_ADDR (the first node) and MASTER_PORT "
                "(a free port) in the batch script"
            )
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    return Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


@contextlib.contextmanager
def process_group(ranks: Ranks, timeout_s: float):
    """The process group of the run (NCCL with a GPU, else Gloo), on this rank's device; yields the torch.device."""
    import torch

    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout_s),
        rank=ranks.rank,
        world_size=ranks.world_size,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield device
    finally:
        torch.distributed.destroy_process_group()


def launch_local_ranks(nproc: int, arguments: list[str]) -> int:
    """Run `mae-scale ARGUMENTS` as nproc ranks on this machine; the exit code of the first rank that failed."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        run_id=str(os.getpid()),
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.2,
    )
    # A rank says itself what was wrong; the launcher's own account of it would bury that.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-m", "mae_scale", *arguments)
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=lambda item: item[1].timestamp)
        if first.exitcode > 0:
            return first.exitcode
        name = signal.Signals(-first.exitcode).name
        raise RunError(
            f"rank {rank} was killed by {name}"
            + (" (out of memory?)" if name == "SIGKILL" else "")
            + "; the same command goes on from the last checkpoint"
        ) from None
    return 0


def extensions_folder() -> Path:
    """Where DeepSpeed's compiled helpers stay: TORCH_EXTENSIONS_DIR, else beside the torch they were built for."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    prefix = Path(sys.prefix)
    if given is None and os.access(prefix, os.W_OK):
        os.environ["TORCH_EXTENSIONS_DIR"] = given = str(prefix / "torch_extensions")
    return Path(given) if given else Path.home() / ".cache" / "torch_extensions"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
