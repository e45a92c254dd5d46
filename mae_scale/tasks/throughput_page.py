"""The report of a throughput sweep on the sweep's parent run in MLflow: table, figure and description."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae_scale.tasks.throughput import as_json, draw
from mae_scale.tasks.throughput_points import ACTIVE, ThroughputPoint
from mae_scale.tracking.mlflow_sweep import MlflowSweep, SweepResults

FIGURE, TABLE = "throughput.png", "throughput_table.json"
COLUMNS = {
    "name": "point",
    "ranks": "ranks",
    "state": "state",
    "images_per_second": "images per second",
    "efficiency": "efficiency",
    "step_time_s": "step (s)",
    "planned_step_time_s": "planned step (s)",
    "compute_s": "compute (s)",
    "communication_s": "communication (s)",
    "data_wait_s": "waiting for images (s)",
    "checkpoint_s": "checkpoint (s)",
}
"""Columns of the table by the key of as_json()."""


def publish(points: list[ThroughputPoint], folder: Path, sweep: MlflowSweep) -> None:
    """Draw the report of the points into their folder, and show it on the sweep's parent run."""
    figures = []
    if any(point.measured is not None for point in points):
        draw(points, folder / FIGURE, title=folder.name)
        figures.append(folder / FIGURE)
    table = _table(points)
    head = [f"| {' | '.join(table)} |", f"|{' --- |' * len(table)}"]
    body = [f"| {' | '.join(cells)} |" for cells in zip(*table.values(), strict=True)]
    about = f"**Throughput** against ranks: {len(points)} points in `{folder.absolute()}`."
    sweep.publish(SweepResults("\n".join([about, "", *head, *body]), figures, {TABLE: table}, _status(points)))


def _status(points: Sequence[ThroughputPoint]) -> str:
    states = [point.state for point in points]
    if any(state.startswith(ACTIVE) or state == "not measured yet" for state in states):
        return "RUNNING"
    return "FINISHED" if set(states) == {"done"} else "FAILED"


def _table(points: list[ThroughputPoint]) -> dict[str, list[str]]:
    rows = as_json(points)
    columns = {column: [_cell(row.get(key)) for row in rows] for key, column in COLUMNS.items()}
    return {column: cells for column, cells in columns.items() if any(cells)}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
