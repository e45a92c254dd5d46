"""Throughput against the number of ranks: the table, the JSON and the figure of `mae-scale scaling report`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError
from mae_scale.reports.throughput import Rate, throughput_figure
from mae_scale.tasks.step_parts import not_told, parts_of
from mae_scale.tasks.throughput_points import ThroughputPoint

NOTE_COLUMNS = 160
"""Characters of a line below the figure."""


def efficiencies(points: list[ThroughputPoint]) -> dict[str, float]:
    """Return by name the rate per rank of each measured point, divided by that of the one with the fewest ranks."""
    rates = {
        point.name: point.measured.images_per_second / (point.ranks or 1)
        for point in points
        if point.measured is not None
    }
    return {name: rate / next(iter(rates.values())) for name, rate in rates.items()}


def reference_ranks(points: list[ThroughputPoint]) -> int | None:
    """Return the fewest ranks that were measured: what efficiency and communication are told against."""
    return next((point.ranks for point in points if point.measured is not None), None)


def as_json(points: list[ThroughputPoint]) -> list[dict[str, Any]]:
    """Return the points as --json writes them."""
    efficiency, parts, reference = efficiencies(points), parts_of(points), reference_ranks(points)
    rows: list[dict[str, Any]] = []
    for point in points:
        row: dict[str, Any] = {"name": point.name, "ranks": point.ranks, "state": point.state}
        if point.measured is not None:
            row |= {**vars(point.measured), "efficiency": efficiency[point.name]}
            row |= {**vars(parts[point.name]), "reference_ranks": reference}
        rows.append(row)
    return rows


def lines(points: list[ThroughputPoint]) -> list[str]:
    """Return a table for people; times are milliseconds per step."""
    efficiency, parts = efficiencies(points), parts_of(points)
    width = max(len(point.name) for point in points)
    planned = any(point.measured is not None and point.measured.planned_step_time_s for point in points)
    said = [
        f"{'':{width}}  {'ranks':>5}  {'images/s':>9}  {'quartiles':>19}  {'efficiency':>10}  {'ms/step':>9}  "
        f"{' planned  ' * planned}{'compute':>10}  {'communication':>13}  {'waiting':>9}  {'checkpoint':>10}"
    ]
    for point in points:
        found, ranks = point.measured, "-" if point.ranks is None else point.ranks
        if found is None:
            said.append(f"{point.name:{width}}  {ranks:>5}  {point.state}")
            continue
        (low, high), part = found.quartiles, parts[point.name]
        compute = f"{_ms(part.rest_s)}*" if part.compute_s is None else f"{_ms(part.compute_s)} "
        plan = f"{_ms(found.planned_step_time_s):>8}  " if planned else ""
        said.append(
            f"{point.name:{width}}  {ranks:>5}  {found.images_per_second:9,.1f}  {low:9,.1f} {high:9,.1f}  "
            f"{efficiency[point.name]:10.1%}  {_ms(found.step_time_s):>9}  {plan}{compute:>10}  "
            f"{_ms(part.communication_s):>13}  {_ms(part.data_wait_s):>9}  {_ms(part.checkpoint_s):>10}"
            + ("" if point.state == "done" else f"  {point.state}")
        )
    return [*said, *_notes(points)]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.2f}"


def _notes(points: list[ThroughputPoint]) -> list[str]:
    """Return what must be known to read the parts of a step."""
    fewest, unclear = reference_ranks(points), not_told(points)
    notes = []
    if sum(part.communication_s is not None for part in parts_of(points).values()) > 1:
        notes.append(
            f"communication: what a step takes beyond that of {fewest} rank(s) with the same work per rank; waiting "
            "for slower ranks is in it"
        )
    if fewest is not None and fewest > 1:
        notes.append(f"compute: with the communication among {fewest} ranks, which is not told without a point of one")
    return [*notes, *(f"* with communication, which cannot be told: {why}" for why in unclear)]


def draw(points: list[ThroughputPoint], path: Path, *, title: str) -> None:
    """Draw the measured points. Raises UsageError when there is none, or the file cannot be written."""
    efficiency, parts = efficiencies(points), parts_of(points)
    rates = [
        Rate(
            point.ranks or 1,
            found.images_per_second,
            *found.quartiles,
            efficiency=efficiency[point.name],
            rest_s=parts[point.name].rest_s,
            compute_s=parts[point.name].compute_s,
            communication_s=parts[point.name].communication_s,
            data_wait_s=found.data_wait_s,
            checkpoint_s=found.checkpoint_s,
            planned=found.planned_step_time_s and found.global_batch / found.planned_step_time_s,
        )
        for point in points
        if (found := point.measured) is not None
    ]
    if not rates:
        raise UsageError("no point has been measured yet; wait for the runs, or look at why they failed")
    unfinished = [
        textwrap.shorten(f"{point.name}: {point.state}", NOTE_COLUMNS, placeholder=" ...")
        for point in points
        if point.state != "done"
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        throughput_figure(rates, path, title=title, note="\n".join(unfinished))
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written: {error.strerror}") from None
