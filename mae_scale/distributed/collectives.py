"""The process group of a run, and functions that all of its ranks call together."""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

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
    """Join the run's process group (NCCL with a GPU, else Gloo) for a block; yield this rank's device.

    Sets the environment variables that torch reads. Gloo's collectives fail after timeout_s, NCCL's after twice that:
    the heartbeat asks over Gloo first, and can name the rank that is missing, where NCCL ends the process. Raises
    RunError when the ranks do not meet.
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


def from_first(work: Callable[[], Result]) -> Result:
    """Return rank 0's result of work() on all ranks, or raise its error on all ranks. All ranks call it.

    The error is a UsageError, a RunError, or for an OSError a RunError; rank 0 prints it.
    """
    import torch

    answer: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            answer = [work(), None]
        except (UsageError, RunError) as error:
            answer = [None, error]
        except OSError as error:
            answer = [None, RunError(_file_and_reason(error))]
        if answer[1] is not None:
            answer[1].on_all_ranks = True
    torch.distributed.broadcast_object_list(answer)
    result, failure = answer
    if failure is not None:
        raise failure
    return cast(Result, result)


def first_then_others(work: Callable[[], Result]) -> Result:
    """Return each rank's own result of work(), done by rank 0 first: it may write what the others then read.

    Where rank 0 fails the others do nothing, and all raise as `from_first` does.
    """
    done: list[Result] = []
    from_first(lambda: done.append(work()))
    return done[0] if done else work()


def from_all(part: Callable[[], Result], group: "torch.distributed.ProcessGroup | None" = None) -> list[Result]:
    """Do each rank's part of a task; return all results, by rank, on all ranks. All ranks of the group call it.

    Where a part fails with an OSError, all ranks raise the same RunError, which names the first such rank.
    """
    import torch

    mine: tuple[Result | None, str | None]
    try:
        mine = part(), None
    except OSError as error:
        mine = None, _file_and_reason(error)
    outcomes: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(outcomes, mine, group=group)
    for rank, (_, failure) in enumerate(outcomes):
        if failure is not None:
            raise RunError(f"rank {rank}: {failure}", on_all_ranks=True)
    return [result for result, _ in outcomes]


def collective_timeout(timeout_s: float, device_type: str) -> timedelta:
    """Return the timeout of a group for tensors on that type of device; NCCL's is twice the recipe's."""
    return timedelta(seconds=2 * timeout_s if device_type == "cuda" else timeout_s)


def _file_and_reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}"
