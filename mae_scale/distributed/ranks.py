"""This process's rank, read from the environment; and how a rank ends."""

import os
import socket
import sys
import time
from dataclasses import dataclass
from typing import NoReturn

from data_pipeline.errors import RunError, UsageError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
ALONE = (0, 1, 0)
LAUNCHER_ENDS_S = 5.0
"""Time in which a launcher ends the ranks of the other nodes after the first rank has failed."""


@dataclass(frozen=True)
class Ranks:
    """Position of this process among the ranks of the run."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        """True on rank 0."""
        return self.rank == 0


def launched() -> bool:
    """Return whether torchrun, deepspeed or srun has started this process as one rank of several."""
    return "RANK" in os.environ or ("SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ)


def this_rank() -> Ranks:
    """Return RANK, WORLD_SIZE and LOCAL_RANK, else Slurm's own variables, else a run of one rank."""
    names = VARIABLES if "RANK" in os.environ else SLURM_VARIABLES if launched() else ()
    values = [int(os.environ.get(name, alone)) for name, alone in zip(names, ALONE, strict=False)]
    return Ranks(*(values or ALONE))


def ranks_from_environment() -> Ranks:
    """Return this process's rank for process_group(); raise UsageError when srun gives no address to meet at."""
    ranks = this_rank()
    if ranks.world_size > 1 and "RANK" not in os.environ and "MASTER_ADDR" not in os.environ:
        raise UsageError(
            "srun started this rank without MASTER_ADDR; export MASTER_ADDR (the first node) and MASTER_PORT "
            "(a free port) in the batch script"
        )
    return ranks


def ranks_per_node(world_size: int) -> int:
    """Return the number of ranks of each node, as the launcher says; all of them where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def say_error(error: UsageError | RunError) -> None:
    """Print the error on stderr, one line per job.

    Before the ranks have met they fail alike, and rank 0 prints it. Another node may lack something that the first
    one has: its first rank prints that, unless a launcher has ended it by then.
    """
    ranks = this_rank()
    if not ranks.is_first:
        if error.on_all_ranks or (not _have_met() and ranks.local_rank):
            return
        if not _have_met():
            time.sleep(LAUNCHER_ENDS_S)
    print(f"error: {'' if ranks.is_first else f'rank {ranks.rank}: '}{error}", file=sys.stderr, flush=True)


def _have_met() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def leave(code: int) -> NoReturn:
    """Flush the output and end this process at once; for a rank, whether it has failed or not.

    Threads of Gloo and NCCL that still run can abort an interpreter that ends as usual ("terminate called without an
    active exception") and hide its exit code; seen after errors, and now and then after success.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
