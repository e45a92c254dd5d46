"""The figure of `mae-scale scaling report`: images per second and efficiency against the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_scale.reports.style import BLUE, GREY, ORANGE, new_figure, save_png


@dataclass(frozen=True)
class Rate:
    """A measured point: images per second, their quartiles, efficiency, and seconds per step, in all and waiting."""

    ranks: int
    images_per_second: float
    low: float
    high: float
    efficiency: float
    step_time_s: float
    data_wait_s: float


def throughput_figure(rates: Sequence[Rate], path: Path, *, title: str) -> None:
    """Write a PNG of rates by ascending ranks: the rate beside perfect scaling, efficiency, and the time of a step."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = new_figure((9.5, 3.8), 120)
    rate_axes, efficiency_axes, time_axes = figure.subplots(1, 3)
    ranks = [rate.ranks for rate in rates]
    first = rates[0]
    perfect = [first.images_per_second * rate.ranks / first.ranks for rate in rates]
    rate_axes.plot(ranks, perfect, color=GREY, linestyle="--", linewidth=1.2, label="perfect scaling")
    spread = [
        [rate.images_per_second - rate.low for rate in rates],
        [rate.high - rate.images_per_second for rate in rates],
    ]
    medians = [rate.images_per_second for rate in rates]
    rate_axes.errorbar(ranks, medians, yerr=spread, color=BLUE, marker="o", markersize=4, capsize=3, label="measured")
    rate_axes.set_yscale("log", base=10)
    rate_axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    rate_axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    rate_axes.yaxis.set_minor_formatter(NullFormatter())
    rate_axes.set_ylabel("images per second")
    rate_axes.legend(frameon=False, fontsize=8)
    efficiency_axes.plot(ranks, [100 * rate.efficiency for rate in rates], color=BLUE, marker="o", markersize=4)
    efficiency_axes.set_ylim(0, max(105.0, *(105 * rate.efficiency for rate in rates)))
    efficiency_axes.set_ylabel("efficiency (%)")
    places = range(len(rates))
    waits = [1000 * rate.data_wait_s for rate in rates]
    rest = [1000 * (rate.step_time_s - rate.data_wait_s) for rate in rates]
    time_axes.bar(places, rest, color=BLUE, width=0.6, label="compute and communication")
    time_axes.bar(places, waits, bottom=rest, color=ORANGE, width=0.6, label="waiting for images")
    time_axes.set_xticks(places, [str(rank) for rank in ranks])
    time_axes.set_ylabel("ms per step")
    time_axes.set_ylim(0, 1.25 * max(1000 * rate.step_time_s for rate in rates))
    time_axes.legend(frameon=False, fontsize=8)
    for axes in (rate_axes, efficiency_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks], minor=False)
    for axes in (rate_axes, efficiency_axes, time_axes):
        _finish(axes)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    save_png(figure, path)


def _finish(axes: Any) -> None:
    axes.set_xlabel("ranks")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
