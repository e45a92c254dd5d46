"""Ranks: who this process is, and the process group."""

import contextlib
import os
import socket
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

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
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    return Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


@contextlib.contextmanager
def process_group(ranks: Ranks, timeout_s: float):
    """The process group of the run (NCCL with a GPU, else Gloo), on this rank's device; yields the torch.device.

    Gloo's collectives fail after timeout_s. NCCL's after twice that: training.control asks over Gloo first, and can
    name the rank that is missing, where NCCL ends the process. Raises RunError when the ranks do not meet.
    """
    import torch

    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    gpu = device.type == "cuda"
    try:
        torch.distributed.init_process_group(
            "nccl" if gpu else "gloo",
            timeout=collective_timeout(timeout_s, device.type),
            rank=ranks.rank,
            world_size=ranks.world_size,
            device_id=device if gpu else None,
        )
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        address, reason = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}", str(error).partition("\n")[0]
        raise RunError(f"the {ranks.world_size} ranks did not meet at {address}: {reason}") from None
    yield device
    # Not after an error: with a peer that is gone this can wait for ever. Then leave() ends the process.
    torch.distributed.destroy_process_group()


def first_then_others(work):
    """Each rank's own result of work(), done by rank 0 first: it may write what the others then find.

    What it raises with an explanation, all raise, and rank 0 says it.
    """
    import torch

    first, answer = torch.distributed.get_rank() == 0, [None]
    if first:
        try:
            result = work()
        except (UsageError, RunError) as error:
            error.on_all_ranks = True
            answer = [error]
    torch.distributed.broadcast_object_list(answer)
    if answer[0] is not None:
        raise answer[0]
    return result if first else work()


def collective_timeout(timeout_s: float, device_type: str) -> timedelta:
    """Of a group for tensors on that type of device: NCCL's is twice the recipe's (see process_group)."""
    return timedelta(seconds=2 * timeout_s if device_type == "cuda" else timeout_s)


def leave(code: int) -> NoReturn:
    """End this process at once, with what it has printed; for a rank, whether it has failed or not.

    Threads of Gloo and NCCL that are still at work can abort an interpreter that ends as usual ("terminate called
    without an active exception"), and hide its code; seen after errors, and now and then at a good end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    """Return a port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
