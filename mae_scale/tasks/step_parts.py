"""The time of a step by part: compute, communication, waiting for images, saving.

Waiting and saving are measured. Communication overlaps with the backward pass, so that no clock around it would tell
what it costs; what can be told is how much longer a step takes than with the fewest ranks that were measured, where
each rank does the same work.
"""

from __future__ import annotations

from dataclasses import dataclass

from mae_scale.tasks.throughput_points import Measured, ThroughputPoint


@dataclass(frozen=True)
class Parts:
    """Parts of a step's time in seconds. What cannot be told is None; then compute and communication are `rest_s`."""

    data_wait_s: float
    rest_s: float
    """Compute and communication."""
    checkpoint_s: float | None
    compute_s: float | None
    communication_s: float | None
    """Exposed communication: what is beyond the time of the point with the fewest ranks."""


def parts_of(points: list[ThroughputPoint]) -> dict[str, Parts]:
    """Return the parts of each measured point by name; `points` ascend by ranks, and the first is the reference."""
    known = [(point, point.measured) for point in points if point.measured is not None]
    return {point.name: _parts(found, point.ranks or 1, known[0][1], known[0][0].ranks or 1) for point, found in known}


def not_told(points: list[ThroughputPoint]) -> str | None:
    """Return why communication cannot be told of some points; None where it can be of all."""
    known = [(point, point.measured) for point in points if point.measured is not None]
    unclear = [(point, found) for point, found in known if not _same_work(found, known[0][1])]
    if not unclear:
        return None
    first, its = known[0]
    named = ", ".join(f"{found.micro_batch or 'unknown'} on {point.ranks}" for point, found in unclear)
    return f"micro-batch {its.micro_batch or 'unknown'} on {first.ranks} ranks, {named}"


def _parts(found: Measured, ranks: int, reference: Measured, fewest: int) -> Parts:
    rest = found.step_time_s - found.data_wait_s
    compute = communication = None
    if _same_work(found, reference):
        # Of equal micro-batches a step has more or fewer, in proportion to its rank's share of the images.
        more = (found.global_batch / ranks) / (reference.global_batch / fewest)
        compute = min(rest, more * (reference.step_time_s - reference.data_wait_s))
        communication = rest - compute
    return Parts(found.data_wait_s, rest, found.checkpoint_s, compute, communication)


def _same_work(found: Measured, reference: Measured) -> bool:
    """Return whether a micro-batch is the same work in both; one of another size takes another time per image."""
    return found is reference or (found.micro_batch is not None and found.micro_batch == reference.micro_batch)
