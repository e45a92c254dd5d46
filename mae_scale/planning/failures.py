"""How often a run of many GPUs fails, how often to save, and what share of the time is lost."""

from __future__ import annotations

import math
from dataclasses import dataclass

GPU_MTBF_S = 50_000 * 3600.0
"""Assumed mean time between failures per GPU: 419 interruptions of 16,384 GPUs in 54 days (arXiv 2407.21783)."""
SAVE_S = 0.06
"""Stall of a background save beside the copy to the host's memory (bench/checkpoint_stall.py, on a CPU)."""
STORAGE_BYTES_PER_S = 5e9
"""Assumed: rate at which the shared storage takes a checkpoint, in the background."""
RESTART_S = 300.0
"""Assumed: from a failure to the first step after it: requeueing, imports, reading the checkpoint."""


@dataclass(frozen=True)
class Failures:
    """Failures of a run and what they cost; seconds, and shares from 0 to 1."""

    mtbf_s: float
    """Mean time between failures of the whole run."""
    stall_s: float
    """How long a save holds training."""
    interval_s: float
    """Time between two saves that loses least."""
    lost: float
    """Share of the time that is lost to saves, to work done twice and to restarts."""


def failures_of(ranks: int, stall_s: float, *, shortest_s: float = 0.0, longest_s: float = math.inf) -> Failures:
    """Return the failures of a run on so many GPUs, each failing on its own, at the best interval between saves.

    The interval is sqrt(2 x stall x MTBF) (Young, Communications of the ACM 17, 1974), between `shortest_s` (that
    of writing one) and `longest_s`. To first order in interval / MTBF a save costs its stall per interval, a failure
    half an interval of work and a restart.
    """
    mtbf = GPU_MTBF_S / ranks
    interval = min(max(math.sqrt(2 * stall_s * mtbf), shortest_s), longest_s)
    lost = stall_s / interval + (interval / 2 + RESTART_S) / mtbf
    return Failures(mtbf, stall_s, interval, min(1.0, lost))
