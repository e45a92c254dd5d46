"""The figure of `mae-scale scaling fit`: points, the law and its band, the prediction of the largest run, residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mae_scale.planning.scaling_law import LEVEL, Fit
from mae_scale.reports.style import BLUE, GREY, ORANGE, new_figure, save_png

COLOURS = ("#1f5fa8", "#2e7d4f", "#7b4fa3", "#b08900", "#2a8c94", "#a83a6b", "#5a6b7b")


@dataclass(frozen=True)
class Drawn:
    """A point of the figure."""

    size: str
    x: float
    y: float
    on_frontier: bool


@dataclass(frozen=True)
class Prediction:
    """The value at x that the other points predict, with its band."""

    x: float
    y: float
    low: float
    high: float


def scaling_fit_figure(
    points: Sequence[Drawn], fit: Fit, prediction: Prediction | None, path: Path, *, labels: tuple[str, str, str]
) -> None:
    """Write a PNG of y against x, both logarithmic, and of the residuals. labels: x, y, and the law as a title."""
    figure = new_figure((7.6, 5.8), 120)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
    x = np.array([point.x for point in points])
    grid = np.geomspace(x.min() / 1.15, x.max() * 1.15, 200)
    low, high = fit.band(grid)
    axes.fill_between(grid, low, high, color=BLUE, alpha=0.15, linewidth=0, label=f"{LEVEL:.0%} band of the fit")
    axes.plot(grid, fit.law(grid), color=BLUE, linewidth=1.6, label="fit")
    for number, size in enumerate(dict.fromkeys(point.size for point in points)):
        colour = COLOURS[number % len(COLOURS)]
        mine = [point for point in points if point.size == size]
        on = [point for point in mine if point.on_frontier]
        off = [point for point in mine if not point.on_frontier]
        axes.scatter([p.x for p in on], [p.y for p in on], color=colour, s=34, zorder=3, label=size)
        axes.scatter([p.x for p in off], [p.y for p in off], edgecolor=colour, facecolor="none", s=26, alpha=0.7)
        below.scatter([p.x for p in on], [100 * (1 - fit.law(p.x) / p.y) for p in on], color=colour, s=22, zorder=3)
    if any(not point.on_frontier for point in points):
        axes.scatter([], [], edgecolor=GREY, facecolor="none", s=26, label="not on the frontier")
    if prediction is not None:
        error = [[prediction.y - prediction.low], [prediction.high - prediction.y]]
        axes.errorbar(
            [prediction.x], [prediction.y], yerr=error, fmt="D", color=ORANGE, markersize=5, capsize=4, zorder=2,
            label="predicted by the others",
        )  # fmt: skip
    _finish(axes, below, labels)
    figure.align_ylabels()
    figure.tight_layout()
    save_png(figure, path)


def _finish(axes: object, below: object, labels: tuple[str, str, str]) -> None:
    """Set scales, labels, grid and legend."""
    from matplotlib.axes import Axes
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    assert isinstance(axes, Axes)
    assert isinstance(below, Axes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    below.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    below.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    below.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(labels[1])
    axes.set_title(labels[2], fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    below.axhline(0, color=BLUE, linewidth=1.2)
    below.set_ylabel("residual (%)")
    below.set_xlabel(labels[0])
    for one in (axes, below):
        one.grid(color="#dddddd", linewidth=0.6)
        one.spines[["top", "right"]].set_visible(False)
