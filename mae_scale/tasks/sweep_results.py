"""The results of a sweep, read from its folder: one value per metric and run, mean and scatter over the seeds."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError
from data_pipeline.files import write_json
from mae_scale.reports.sweep import Curve, sweep_figure
from mae_scale.tasks.scaling_points import THEN
from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.tracking.mlflow_sweep import SweepResults
from mae_scale.training.reference_curves import curve
from mae_scale.training.run_state import DONE, NOT_STARTED, RUNNING, STOPPED_EARLY, run_state

SWEEP, RESULTS, FIGURE = "sweep.json", "results.json", "results.png"
TABLE = "results_table.json"
"""The table in MLflow, which lists files by name: the figure comes first."""
METRICS = {
    "val/loss": "val/loss",
    "train/loss": "train/loss",
    "val/top1": "top1",
    "val/knn_top1": "knn_top1",
    "val/box_ap": "box_ap",
    "val/mask_ap": "mask_ap",
    "val/mean_iou": "mean_iou",
}
"""Metrics of a run by their names here."""
THEN_METRICS = {
    metric: f"then_{METRICS[metric]}" for metric in ("val/top1", "val/box_ap", "val/mask_ap", "val/mean_iou")
}
"""Metrics of the transfer after it."""
ROWS_IN_DESCRIPTION = 30
ENDED = (DONE, STOPPED_EARLY)


@dataclass(frozen=True)
class Entry:
    """A run of the sweep, with the transfer after it: its values on the axes, its state, its final metrics."""

    name: str
    values: dict[str, str]
    state: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Row:
    """Runs that differ in the seed only. values: a text per axis. metrics: {name: a value per run that is done}."""

    values: tuple[str, ...]
    runs: int
    states: tuple[str, ...]
    metrics: dict[str, list[float]]

    @property
    def done(self) -> int:
        """Return how many of the runs are done."""
        return sum(state in ENDED for state in self.states)

    @property
    def state(self) -> str:
        """Return the states of the runs that are not done, each once; nothing when all are."""
        return ", ".join(dict.fromkeys(state for state in self.states if state not in ENDED))


@dataclass(frozen=True)
class Results:
    """A sweep's runs, grouped by their values on the axes, in the order of the grid."""

    out: Path
    name: str
    recipe: str
    then: str | None
    axes: list[str]
    entries: list[Entry]
    rows: list[Row]

    @property
    def metrics(self) -> list[str]:
        """Return the metrics that some run has."""
        found = {metric for row in self.rows for metric in row.metrics}
        return [name for name in (*METRICS.values(), *THEN_METRICS.values()) if name in found]

    def lines(self) -> list[str]:
        """Return a table for people."""
        table = self.table()
        cells = [list(table), *[[str(value) for value in row] for row in zip(*table.values(), strict=True)]]
        widths = [max(len(row[column]) for row in cells) for column in range(len(table))]
        return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]

    def table(self) -> dict[str, list[str]]:
        """Return {column: cells}, a row per point of the grid; metrics as mean +- standard deviation over the seeds."""
        columns = {axis: [row.values[number] for row in self.rows] for number, axis in enumerate(self.axes)}
        columns["runs"] = [f"{row.done}/{row.runs}" for row in self.rows]
        for metric in self.metrics:
            columns[metric] = [_summary(row.metrics.get(metric, [])) for row in self.rows]
        if any(row.state for row in self.rows):
            columns["state"] = [row.state for row in self.rows]
        return columns

    def as_json(self) -> dict[str, Any]:
        """Return the results as results.json holds them."""
        return {
            "name": self.name,
            "recipe": self.recipe,
            "then": self.then,
            "axes": self.axes,
            "points": [
                {"values": dict(zip(self.axes, row.values, strict=True)), "runs": row.runs, "done": row.done}
                | {"metrics": {name: _numbers(values) for name, values in row.metrics.items()}}
                for row in self.rows
            ],
        }

    def write(self) -> list[Path]:
        """Write results.json and, once a run is done, results.png into the sweep's folder; return their paths."""
        write_json(self.out / RESULTS, self.as_json())
        written = [self.out / RESULTS]
        if self.metrics:
            sweep_figure(self._curves(), self.axes[0] if self.axes else "", self.out / FIGURE, title=self.name)
            written.append(self.out / FIGURE)
        return written

    def page(self) -> SweepResults:
        """Return what MLflow shows of the sweep."""
        table = self.table()
        head = [f"| {' | '.join(table)} |", f"|{' --- |' * len(table)}"]
        body = [f"| {' | '.join(cells)} |" for cells in zip(*table.values(), strict=True)]
        if len(body) > ROWS_IN_DESCRIPTION:
            body = [*body[:ROWS_IN_DESCRIPTION], "", f"{len(body) - ROWS_IN_DESCRIPTION} more rows in {RESULTS}."]
        then = f", each followed by `{self.then}`" if self.then else ""
        about = f"**Sweep** of `{self.recipe}`{then}: {len(self.entries)} runs in `{self.out.absolute()}`."
        states = {entry.state for entry in self.entries}
        unfinished = "RUNNING" if states & {RUNNING, NOT_STARTED} else "FAILED"
        status = "FINISHED" if states <= set(ENDED) else unfinished
        figures = [path for path in [self.out / FIGURE] if path.exists()]
        return SweepResults("\n".join([about, "", *head, *body]), figures, {TABLE: table}, status, figures)

    def _curves(self) -> dict[str, list[Curve]]:
        """Return the curves of each metric: along the first axis, a curve per combination of the others."""
        curves: dict[str, list[Curve]] = {}
        for metric in self.metrics:
            grouped: dict[str, list[tuple[str, list[float]]]] = defaultdict(list)
            for row in self.rows:
                if row.metrics.get(metric):
                    x, *others = row.values or ("",)
                    label = ", ".join(f"{axis} {text}" for axis, text in zip(self.axes[1:], others, strict=True))
                    grouped[label].append((x, row.metrics[metric]))
            curves[metric] = [Curve(label, points) for label, points in grouped.items()]
        return curves


def read_results(out: Path) -> Results:
    """Return the results of the sweep in a folder. Raises UsageError when there is no sweep."""
    path = out / SWEEP
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(
            f"{out} holds no sweep (no readable {SWEEP}); expected the --out of `mae-scale sweep`"
        ) from None
    axes: list[list[str]] = kept["axes"]
    entries = [_entry(out / name, values, kept["then"]) for name, values in kept["points"].items()]
    groups: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[tuple(":".join(entry.values[key] for key in keys) for keys in axes)].append(entry)
    names = [":".join(key.rpartition(".")[2] for key in keys) for keys in axes]
    rows = [_row(values, group) for values, group in groups.items()]
    return Results(out, kept["name"], kept["recipe"], kept["then"], names, entries, rows)


def _row(values: tuple[str, ...], group: Sequence[Entry]) -> Row:
    metrics: dict[str, list[float]] = defaultdict(list)
    for entry in group:
        for name, value in entry.metrics.items():
            metrics[name].append(value)
    return Row(values, len(group), tuple(entry.state for entry in group), dict(metrics))


def _entry(folder: Path, values: dict[str, str], then: str | None) -> Entry:
    state = run_state(folder)
    metrics = _final(folder, METRICS) if state in ENDED else {}
    if then is not None and state in ENDED:
        following = run_state(folder / THEN)
        if following in ENDED:
            metrics |= _final(folder / THEN, THEN_METRICS)
        else:
            state = f"{THEN}: {following}"
    return Entry(folder.name, values, state, metrics)


def _final(folder: Path, metrics: Mapping[str, str]) -> dict[str, float]:
    """Return a run's metrics at its end; training loss is the mean over the last epoch."""
    curves = curve(read_metrics(folder / "metrics.jsonl"))
    found = {}
    for metric, name in metrics.items():
        value = curves[metric][-1] if curves.get(metric) else None
        if value is not None and isfinite(value):
            found[name] = value
    return found


def _numbers(values: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"values": values, "mean": statistics.fmean(values), "sd": spread}


def _summary(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" +- {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{spread}"
