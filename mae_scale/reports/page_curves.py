"""The curves of a page: those of many runs as one small table of numbers, grouped by the kind of training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mae_scale.reports.page_content import Curve, PageRun

POINTS = (300, 200, 120, 80, 50, 30, 20, 12)
"""Points per curve: the first of these with which all curves fit."""
BYTES = 2_400_000
"""Limit of all curves together."""
BYTES_PER_NUMBER = 7.5

METRICS = {
    "train/loss": "training loss",
    "val/loss": "validation loss",
    "val/top1": "top-1 accuracy, %",
    "val/knn_top1": "k-NN top-1 accuracy, %",
    "val/box_ap": "average precision of boxes, %",
    "val/mask_ap": "average precision of masks, %",
    "val/mean_iou": "mean intersection over union, %",
    "train/grad_norm": "gradient norm",
    "train/lr": "learning rate",
    "perf/images_per_second": "images per second",
    "perf/data_wait_s": "waiting for images, s per step",
}
LARGEST = ("train/grad_norm", "perf/data_wait_s")
"""Metrics of which a point is the largest of its interval, so that no spike is averaged away; of others the mean."""


def is_largest(metric: str) -> bool:
    """Return whether a point of a metric's thinned curve is the largest of its interval."""
    return metric in LARGEST


def curve_of(points: Iterable[tuple[float, float]]) -> Curve:
    """Return a curve of (epoch, value) pairs in their order."""
    pairs = np.array(list(points), dtype=np.float64).reshape(-1, 2)
    values = np.where(np.isfinite(pairs[:, 1]), pairs[:, 1], np.nan)
    return Curve(pairs[:, 0], values)


def thinned(curve: Curve, points: int, *, largest: bool = False) -> Curve:
    """Return a curve of at most `points` points, each the mean, or the largest, of an interval and at its end."""
    count = len(curve.values)
    if count <= points:
        return curve
    edges = np.linspace(0, count, points + 1).astype(int)
    known = np.isfinite(curve.values)
    counts = np.add.reduceat(known.astype(int), edges[:-1])
    if largest:
        values = np.maximum.reduceat(np.where(known, curve.values, -np.inf), edges[:-1])
    else:
        values = np.add.reduceat(np.where(known, curve.values, 0.0), edges[:-1]) / np.maximum(counts, 1)
    return Curve(curve.epochs[edges[1:] - 1], np.where(counts > 0, values, np.nan))


def points_per_curve(runs: Sequence[PageRun]) -> int:
    """Return the number of points per curve with which the curves of all runs fit into BYTES."""
    lengths = np.array([len(run.curves[name].values) for run in runs for name in METRICS if name in run.curves])
    for points in POINTS:
        # Epochs are shared by the curves of a run, and often by runs: half of the numbers again at most.
        if 1.5 * BYTES_PER_NUMBER * float(np.minimum(lengths, points).sum()) <= BYTES:
            return points
    return POINTS[-1]


def chart_data(runs: Sequence[PageRun], points: int) -> dict[str, Any]:
    """Return what the page's charts draw.

    groups: for each kind of training its runs (rows of the page's table) and charts; a chart has for each run
    [row of `epochs`, values], or None where the run has no such metric.
    """
    rows: dict[tuple[float, ...], int] = {}
    groups = []
    for kind in dict.fromkeys(run.kind for run in runs):
        members = [(number, run) for number, run in enumerate(runs) if run.kind == kind and run.curves]
        charts = []
        for metric, title in METRICS.items():
            series = [_series(run.curves, metric, points, rows) for _, run in members]
            if any(series):
                charts.append({"metric": metric, "title": title, "series": series})
        if charts:
            names = [run.name for _, run in members]
            groups.append({"kind": kind, "rows": [number for number, _ in members], "runs": names, "charts": charts})
    return {"groups": groups, "epochs": [list(row) for row in rows]}


def _series(
    curves: Mapping[str, Curve], metric: str, points: int, rows: dict[tuple[float, ...], int]
) -> list[Any] | None:
    if metric not in curves:
        return None
    curve = thinned(curves[metric], points, largest=is_largest(metric))
    epochs = tuple(float(f"{epoch:.6g}") for epoch in curve.epochs)
    values = [_short(value) for value in curve.values.tolist()]
    return [rows.setdefault(epochs, len(rows)), values]


def _short(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.4g}")
    return int(short) if short.is_integer() and abs(short) < 1e9 else short


def script_json(value: Any) -> str:
    """Return JSON that may stand inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: other characters are \\u escapes
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
