"""The figure of `mae-scale sweep`: each metric against the first axis of the grid."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_scale.reports.style import new_figure, save_png

MOST_LABELS = 12
MOST_IN_A_ROW = 2
"""Panels; a wider figure would push MLflow's column of tags out of the window."""


@dataclass(frozen=True)
class Curve:
    """Points of one curve: the text of the value on the first axis, and the metric of each seed."""

    label: str
    points: Sequence[tuple[str, Sequence[float]]]


def sweep_figure(curves: Mapping[str, Sequence[Curve]], x_label: str, path: Path, *, title: str) -> None:
    """Write a PNG with a panel per metric: means, and one standard deviation of the seeds as a bar."""
    columns = min(len(curves), MOST_IN_A_ROW)
    rows = math.ceil(len(curves) / columns)
    figure = new_figure((max(5.0, 3.8 * columns), 3.9 * rows), 100)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(curves) :]:
        panel.remove()
    for panel, (metric, lines) in zip(panels, curves.items(), strict=False):
        places = _places(lines)
        for curve in lines:
            _draw(panel, curve, places)
        _finish(panel, places, x_label, metric)
    handles, labels = panels[0].get_legend_handles_labels()
    if any(labels):
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    save_png(figure, path)


def _places(lines: Sequence[Curve]) -> dict[str, float]:
    """Return where each value of the first axis stands: at its number, or where some are none, one beside the other."""
    texts = list(dict.fromkeys(text for curve in lines for text, _ in curve.points))
    try:
        return {text: float(text) for text in texts}
    except ValueError:
        return {text: float(number) for number, text in enumerate(texts)}


def _draw(panel: Any, curve: Curve, places: Mapping[str, float]) -> None:
    points = sorted((places[text], values) for text, values in curve.points)
    spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
    means = [statistics.fmean(values) for _, values in points]
    panel.errorbar(
        [x for x, _ in points],
        means,
        yerr=spread,
        marker="o",
        markersize=4,
        capsize=3,
        label=curve.label,
        linewidth=1.2,
    )


def _finish(panel: Any, places: Mapping[str, float], x_label: str, metric: str) -> None:
    numbers = sorted(places.values())
    if numbers[0] > 0 and _unevenness([math.log(number) for number in numbers]) < _unevenness(numbers):
        panel.set_xscale("log")
        panel.minorticks_off()
    if len(places) <= MOST_LABELS:
        panel.set_xticks(list(places.values()), list(places), fontsize=8)
    panel.ticklabel_format(axis="y", useOffset=False)
    panel.margins(x=0.12, y=0.1)
    panel.set_xlabel(x_label)
    panel.set_title(metric, fontsize=10)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _unevenness(numbers: Sequence[float]) -> float:
    """Return the largest gap between ascending numbers over the smallest."""
    gaps = [high - low for low, high in itertools.pairwise(numbers)] or [1.0]
    return max(gaps) / min(gaps)
