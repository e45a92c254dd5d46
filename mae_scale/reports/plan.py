"""The figure of `mae-scale plan`: planned throughput and efficiency from one GPU to thousands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mae_scale.planning.search import Scale
from mae_scale.reports.style import BLUE, GREY, ORANGE, new_figure, save_png


def plan_figure(weak: Sequence[Scale], strong: Sequence[Scale], path: Path, *, title: str, global_batch: int) -> None:
    """Write a PNG of weak and strong scaling: images per second beside perfect scaling, and efficiency."""
    figure = new_figure((9.0, 3.8), 120)
    figure.set_layout_engine("constrained")
    rates, efficiency = figure.subplots(1, 2)
    first = weak[0]
    rates.plot(
        [scale.ranks for scale in weak],
        [first.images_per_second * scale.ranks / first.ranks for scale in weak],
        color=GREY,
        linestyle=":",
        label="perfect",
    )
    curves = (("weak: images per GPU stay", weak, BLUE), (f"strong: {global_batch:,} images per step", strong, ORANGE))
    for label, scales, colour in curves:
        ranks = [scale.ranks for scale in scales]
        rates.plot(ranks, [scale.images_per_second for scale in scales], "o-", markersize=3, color=colour, label=label)
        efficiency.plot(ranks, [100 * scale.efficiency for scale in scales], "o-", markersize=3, color=colour)
    rates.set_yscale("log")
    rates.set_ylabel("images/s, planned")
    efficiency.set_ylabel("efficiency (%), over one GPU")
    efficiency.set_ylim(bottom=0)
    rates.legend(frameon=False, fontsize=8)
    for axes in (rates, efficiency):
        axes.set_xscale("log", base=2)
        axes.set_xticks([scale.ranks for scale in weak][::2], [f"{scale.ranks:,}" for scale in weak][::2], minor=False)
        axes.set_xlabel("GPUs")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    save_png(figure, path)
