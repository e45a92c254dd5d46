"""The figure of `mae-scale compare`: curves of runs by epoch over those of references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mae_scale.reports.style import DARK, GREY, new_figure, save_png

Curve = Mapping[str, Sequence[float | None]]

PANELS = {
    "loss (dashed: validation)": {"train/loss": "-", "val/loss": "--"},
    "gradient norm": {"train/grad_norm": "-"},
    "top-1, % (dotted: k-NN)": {"val/top1": "-", "val/knn_top1": ":"},
    "average precision, % (dotted: masks)": {"val/box_ap": "-", "val/mask_ap": ":"},
    "mean intersection over union, %": {"val/mean_iou": "-"},
}
COLOURS = ("#1f5fa8", "#c0562b", "#2e7d4f", "#7b4fa3", "#b08900", "#2a8c94", "#a83a6b", "#5a6b7b")
SPAN_OF_LOG_SCALE = 20.0
LEGEND_COLUMNS, LEGEND_ROW_INCHES = 3, 0.22


def comparison_figure(runs: Mapping[str, Curve], references: Mapping[str, Curve], path: Path) -> None:
    """Write a PNG of runs' curves by epoch, in colour, over wide grey ones of references; a panel a kind of metric.

    runs, references: {name: {metric: a value for each epoch, None where there is none}}.
    """
    shown = {title: lines for title, lines in PANELS.items() if any(lines.keys() & run.keys() for run in runs.values())}
    head = LEGEND_ROW_INCHES * (1 + (len(runs) + len(references) - 1) // LEGEND_COLUMNS) + 0.15
    height = head + 0.5 + 2.6 * len(shown)
    figure = new_figure((8, height), 120)
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    handles: dict[str, Any] = {}
    for axes, (title, lines) in zip(panels, shown.items(), strict=True):
        for number, (name, curve) in enumerate(references.items()):
            style = {"color": (GREY, DARK)[number % 2], "linewidth": 4, "alpha": 0.35}
            handles.setdefault(f"reference: {name}", _draw(axes, curve, lines, style))
        for number, (name, curve) in enumerate(runs.items()):
            handles.setdefault(name, _draw(axes, curve, lines, {"color": COLOURS[number % len(COLOURS)]}))
        _scale(axes)
        axes.set_ylabel(title)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    panels[-1].set_xlabel("epoch")
    figure.align_ylabels()
    figure.tight_layout(rect=(0, 0, 1, 1 - head / height))
    drawn = {name: handle for name, handle in handles.items() if handle is not None}
    figure.legend(drawn.values(), drawn.keys(), loc="upper center", ncols=LEGEND_COLUMNS, frameon=False, fontsize=9)
    save_png(figure, path)


def _draw(axes: Any, curve: Curve, lines: Mapping[str, str], style: Mapping[str, Any]) -> Any | None:
    """Draw the metrics of one panel; return the first line, None where there is none."""
    first = None
    for metric, dashes in lines.items():
        points = [(epoch, value) for epoch, value in enumerate(curve.get(metric, ()), start=1) if value is not None]
        if points:
            marker = "." if len(points) < 3 else None
            (line,) = axes.plot(*zip(*points, strict=True), dashes, marker=marker, **{"linewidth": 1.4, **style})
            first = first or line
    return first


def _scale(axes: Any) -> None:
    """Use a logarithmic scale for positive values that span more than a factor of SPAN_OF_LOG_SCALE."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    values = [value for line in axes.lines for value in line.get_ydata()]
    if min(values) > 0 and max(values) > SPAN_OF_LOG_SCALE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
