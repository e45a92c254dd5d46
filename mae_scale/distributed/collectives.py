"""The process group of a run, and what its ranks do together."""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from data_pipeline.errors import RunError, UsageError
from mae_scale.distributed.ranks import VARIABLES, Ranks, free_port

if TYPE_CHECKING:
    import torch


def _set_environment(ranks: Ranks) -> None:
    """Set the environment variables of torch's launchers, which torch and DeepSpeed read."""
    os.environ.update(zip(VARIABLES, map(str, (ranks.rank, ranks.world_size, ranks.local_rank)), strict=True))
    if "LOCAL_WORLD_SIZE" not in os.environ and "SLURM_NTASKS_PER_NODE" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["SLURM_NTASKS_PER_NODE"]
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_PORT", str(free_port()))


@contextlib.contextmanager
def process_group(ranks: Ranks, timeout_s: float) -> "Iterator[torch.device]":
    """The process group of the run (NCCL with a GPU, else Gloo), on this rank's device; yields the torch.device.

    Gloo's collectives fail after timeout_s. NCCL's after twice that: the heartbeat asks over Gloo first, and can name
    the rank that is missing, where NCCL ends the process. Raises RunError when the ranks do not meet.
    """
    import torch

    _set_environment(ranks)
    if torch.cuda.is_available():
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
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


Result = TypeVar("Result")


def first_then_others(work: Callable[[], Result]) -> Result:
    """Return each rank's own result of work(), done by rank 0 first: it may write what the others then find.

    A UsageError or RunError of rank 0 is raised on all ranks, and printed by rank 0.
    """
    import torch

    first = torch.distributed.get_rank() == 0
    answer: list[UsageError | RunError | None] = [None]
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
