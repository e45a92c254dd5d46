"""Worker of test_collectives: what each of the ranks gets, by case; rank 0 writes the answers of all."""

import json
import os
import sys
from pathlib import Path

import torch

from data_pipeline.errors import RunError, UsageError
from mae_scale.distributed.collectives import first_then_others, from_all, from_first, process_group
from mae_scale.distributed.ranks import leave, ranks_from_environment

OUT = Path(sys.argv[2])


def rank_0_alone(work):
    """Return work as rank 0 does it, and as no other rank may."""
    return work if torch.distributed.get_rank() == 0 else lambda: os._exit(3)


def refuse() -> None:
    raise UsageError("no such folder; give another")


def full_disk() -> None:
    raise OSError(28, "No space left on device", "shard")


def write_or_read() -> str:
    """Write a file on rank 0; on the others read what must be there already."""
    file = OUT.parent / "written"
    if torch.distributed.get_rank() == 0:
        file.write_text("by rank 0")
    return file.read_text()


def failing_on_1() -> int:
    rank = torch.distributed.get_rank()
    if rank == 1:
        full_disk()
    return rank


CASES = {
    "value": lambda: from_first(rank_0_alone(lambda: "of rank 0")),
    "refused": lambda: from_first(rank_0_alone(refuse)),
    "full": lambda: from_first(rank_0_alone(full_disk)),
    "first, then others": lambda: first_then_others(write_or_read),
    "first fails": lambda: first_then_others(rank_0_alone(refuse)),
    "all": lambda: from_all(torch.distributed.get_rank),
    "one fails": lambda: from_all(failing_on_1),
}


def answer(case: str) -> list:
    try:
        return ["result", CASES[case]()]
    except (UsageError, RunError) as error:
        return [type(error).__name__, str(error), error.on_all_ranks]


ranks = ranks_from_environment()
with process_group(ranks, 60):
    answers = {case: from_all(lambda case=case: answer(case)) for case in CASES}
    if ranks.is_first:
        OUT.write_text(json.dumps(answers))
leave(0)
