"""Throughput against the number of ranks, read from the folders of short runs: DIR/ranks_0002, DIR/nodes_0016, ..."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UsageError
from mae_scale.reports.throughput import Rate, throughput_figure
from mae_scale.tracking.metrics_log import parse_rows, read_metrics

WARM_UP_SHARE = 0.2
"""Share of a point's steps, the first ones, that is left out."""


@dataclass(frozen=True)
class Measured:
    """What a point has measured: medians over its logged intervals after the warm-up, and quartiles of the rate."""

    images_per_second: float
    quartiles: tuple[float, float]
    step_time_s: float
    data_wait_s: float
    intervals: int


@dataclass(frozen=True)
class ThroughputPoint:
    """A short run on some ranks."""

    name: str
    ranks: int
    state: str
    """done, running (or killed), or why it failed."""
    measured: Measured | None


def read_throughput(folder: Path) -> list[ThroughputPoint]:
    """Return the points in the folders of FOLDER, by ranks. Raises UsageError when there is none."""
    points = [_point(path.parent) for path in sorted(folder.glob("*/events.jsonl"))]
    if not points:
        raise UsageError(
            f"{folder} has no folders of runs that have started; expected what `mae-scale scaling run` or "
            "slurm/scaling.sbatch leaves, such as ranks_0002"
        )
    return sorted(points, key=lambda point: (point.ranks, point.name))


def efficiencies(points: list[ThroughputPoint]) -> dict[str, float]:
    """Return by name the rate per rank of each measured point, divided by that of the one with the fewest ranks."""
    known = [(point, point.measured) for point in points if point.measured is not None]
    if not known:
        return {}
    first, its = known[0]
    return {
        point.name: (found.images_per_second / point.ranks) / (its.images_per_second / first.ranks)
        for point, found in known
    }


def as_json(points: list[ThroughputPoint]) -> list[dict[str, Any]]:
    """Return the points as --json writes them."""
    efficiency = efficiencies(points)
    return [
        {
            "name": point.name,
            "ranks": point.ranks,
            "state": point.state,
            **({} if point.measured is None else {**vars(point.measured), "efficiency": efficiency[point.name]}),
        }
        for point in points
    ]


def lines(points: list[ThroughputPoint]) -> list[str]:
    """Return a table for people."""
    efficiency = efficiencies(points)
    width = max(len(point.name) for point in points)
    said = [
        f"{'':{width}}  {'ranks':>5}  {'images/s':>9}  {'quartiles':>19}  {'efficiency':>10}  {'s a step':>9}  waiting"
    ]
    for point in points:
        found = point.measured
        if found is None:
            said.append(f"{point.name:{width}}  {point.ranks:5}  {point.state}")
            continue
        low, high = found.quartiles
        said.append(
            f"{point.name:{width}}  {point.ranks:5}  {found.images_per_second:9,.1f}  {low:9,.1f} {high:9,.1f}  "
            f"{efficiency[point.name]:10.1%}  {found.step_time_s:10.4f}  {found.data_wait_s / found.step_time_s:7.1%}"
            + ("" if point.state == "done" else f"  {point.state}")
        )
    return said


def draw(points: list[ThroughputPoint], path: Path, *, title: str) -> None:
    """Draw the measured points. Raises UsageError when there is none, or the file cannot be written."""
    efficiency = efficiencies(points)
    rates = [
        Rate(
            point.ranks,
            found.images_per_second,
            *found.quartiles,
            efficiency=efficiency[point.name],
            step_time_s=found.step_time_s,
            data_wait_s=found.data_wait_s,
        )
        for point in points
        if (found := point.measured) is not None
    ]
    if not rates:
        raise UsageError("no point has been measured yet; wait for the runs, or look at why they failed")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        throughput_figure(rates, path, title=title)
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written: {error.strerror}") from None


def _point(folder: Path) -> ThroughputPoint:
    events = [row for _, row in parse_rows((folder / "events.jsonl").read_bytes()) if row is not None]
    starts = [row for row in events if row["event"] == "start"]
    ranks = int(starts[-1]["world_size"]) if starts else 0
    last = events[-1] if events else {"event": "start"}
    state = {"end": "done", "stop": "stopped", "failure": f"failed: {last.get('reason')}"}.get(
        last["event"], "running or killed"
    )
    return ThroughputPoint(folder.name, ranks, state, _measured(folder))


def _measured(folder: Path) -> Measured | None:
    """Return what a run has measured after its warm-up; None before that."""
    rows = read_metrics(folder / "metrics.jsonl")
    last = rows[-1]["step"] if rows else 0
    kept = [row for before, row in pairwise(rows) if before["step"] >= WARM_UP_SHARE * last]
    if not kept:
        return None
    low, median, high = np.quantile([row["perf/images_per_second"] for row in kept], (0.25, 0.5, 0.75)).tolist()
    step_time = float(np.median([row["perf/step_time_s"] for row in kept]))
    data_wait = float(np.median([row["perf/data_wait_s"] for row in kept]))
    return Measured(median, (low, high), step_time, data_wait, len(kept))
