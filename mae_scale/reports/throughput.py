"""The figure of `mae-scale scaling report`: images per second, efficiency and the time of a step by ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_scale.reports.style import BLUE, DARK, GREY, ORANGE, new_figure, save_png

LIGHT_BLUE, GREEN = "#9dbfe3", "#3b8f63"


@dataclass(frozen=True)
class Rate:
    """A measured point: images per second, their quartiles, efficiency, and the parts of a step's time in seconds."""

    ranks: int
    images_per_second: float
    low: float
    high: float
    efficiency: float
    rest_s: float
    """Compute and communication, which are told apart only where compute_s and communication_s are given."""
    compute_s: float | None
    communication_s: float | None
    data_wait_s: float
    checkpoint_s: float | None
    planned: float | None
    """Images per second as planned."""


def throughput_figure(rates: Sequence[Rate], path: Path, *, title: str, note: str = "") -> None:
    """Write a PNG of rates by ascending ranks: the rate beside perfect scaling, efficiency, and the time of a step.

    note: lines to write below, such as the points that are not measured yet.
    """
    figure = new_figure((10.5, 4.0 + 0.2 * len(note.splitlines())), 120)
    rate_axes, efficiency_axes, time_axes = figure.subplots(1, 3)
    _draw_rates(rate_axes, rates)
    efficiency_axes.plot(
        [rate.ranks for rate in rates], [100 * rate.efficiency for rate in rates], color=BLUE, marker="o", markersize=4
    )
    efficiency_axes.set_ylim(0, max(105.0, *(105 * rate.efficiency for rate in rates)))
    efficiency_axes.set_ylabel("efficiency (%)")
    _draw_parts(time_axes, rates)
    for axes in (rate_axes, efficiency_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks([rate.ranks for rate in rates], [str(rate.ranks) for rate in rates], minor=False)
    for axes in (rate_axes, efficiency_axes, time_axes):
        _finish(axes)
    figure.suptitle(title, fontsize=11)
    below = 0.2 * len(note.splitlines()) / figure.get_figheight()
    figure.text(0.01, 0.01, note, fontsize=8, color=DARK, va="bottom")
    figure.tight_layout(rect=(0, below, 1, 1))
    save_png(figure, path)


def _draw_rates(axes: Any, rates: Sequence[Rate]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ranks, first = [rate.ranks for rate in rates], rates[0]
    perfect = [first.images_per_second * rate.ranks / first.ranks for rate in rates]
    axes.plot(ranks, perfect, color=GREY, linestyle="--", linewidth=1.2, label="perfect scaling")
    spread = [
        [rate.images_per_second - rate.low for rate in rates],
        [rate.high - rate.images_per_second for rate in rates],
    ]
    medians = [rate.images_per_second for rate in rates]
    axes.errorbar(ranks, medians, yerr=spread, color=BLUE, marker="o", markersize=4, capsize=3, label="measured")
    planned = [(rate.ranks, rate.planned) for rate in rates if rate.planned is not None]
    if planned:
        axes.plot(*zip(*planned, strict=True), color=ORANGE, linestyle=":", marker="s", markersize=4, label="planned")
    axes.set_yscale("log", base=10)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("images per second")
    axes.legend(frameon=False, fontsize=8)


def _draw_parts(axes: Any, rates: Sequence[Rate]) -> None:
    """Draw a bar per point, of the parts of its step that are known."""
    fewest = rates[0].ranks
    parts: list[tuple[str, str, list[float | None]]] = [
        ("compute", BLUE, [rate.compute_s for rate in rates]),
        (
            "compute and communication",
            LIGHT_BLUE,
            [rate.rest_s if rate.compute_s is None else None for rate in rates],
        ),
        (f"communication (beyond {fewest} rank{'s' if fewest > 1 else ''})", GREEN, [r.communication_s for r in rates]),
        ("waiting for images", ORANGE, [rate.data_wait_s for rate in rates]),
        ("checkpoint", GREY, [rate.checkpoint_s for rate in rates]),
    ]
    places, below = range(len(rates)), [0.0] * len(rates)
    for label, colour, seconds in parts:
        heights = [1000 * (value or 0.0) for value in seconds]
        if any(heights):
            axes.bar(places, heights, bottom=below, color=colour, width=0.6, label=label)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_xticks(places, [str(rate.ranks) for rate in rates])
    axes.set_ylabel("ms per step")
    axes.set_ylim(0, 1.5 * max(below))
    axes.legend(frameon=False, fontsize=8)


def _finish(axes: Any) -> None:
    axes.set_xlabel("ranks")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
