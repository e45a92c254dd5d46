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
    known = _known(points)
    return {point.name: _parts(point, found, *known[0]) for point, found in known}


def not_told(points: list[ThroughputPoint]) -> list[str]:
    """Return the reasons why communication cannot be told of some points."""
    known = _known(points)
    return list(dict.fromkeys(why for point, found in known if (why := _why_not(point, found, *known[0]))))


def _known(points: list[ThroughputPoint]) -> list[tuple[ThroughputPoint, Measured]]:
    return [(point, point.measured) for point in points if point.measured is not None]


def _parts(point: ThroughputPoint, found: Measured, fewest: ThroughputPoint, reference: Measured) -> Parts:
    rest = found.step_time_s - found.data_wait_s
    compute = communication = None
    if _why_not(point, found, fewest, reference) is None:
        # Of equal micro-batches a step has more or fewer, in proportion to its rank's share of the images.
        more = (found.global_batch / (point.ranks or 1)) / (reference.global_batch / (fewest.ranks or 1))
        compute = min(rest, more * (reference.step_time_s - reference.data_wait_s))
        communication = rest - compute
    return Parts(found.data_wait_s, rest, found.checkpoint_s, compute, communication)


def _why_not(point: ThroughputPoint, found: Measured, fewest: ThroughputPoint, reference: Measured) -> str | None:
    """Return why a point's communication cannot be told from its difference to the reference; None where it can."""
    if point is fewest:
        return None
    if found.device == "cpu" and point.is_local:
        return "ranks on the CPUs of one machine slow each other down without communicating"
    if None in (found.micro_batch, reference.micro_batch):
        return "the micro-batch is not known (no engine.json)"
    if found.micro_batch != reference.micro_batch:
        # One of another size takes another time per image.
        return (
            f"micro-batches differ, {reference.micro_batch} on {fewest.ranks} rank(s) and {found.micro_batch} on "
            f"{point.ranks} (`scaling run --kind weak` keeps them)"
        )
    return None
