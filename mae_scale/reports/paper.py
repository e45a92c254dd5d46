"""The figure of `mae-scale paper`: each claim's difference over the seeds, and what it must exceed to be decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mae_scale.reports.style import BLUE, DARK, GREY, ORANGE, new_figure, save_png


@dataclass(frozen=True)
class ClaimBar:
    """A claim, its mean difference in points of top-1, the margin (None with one seed), and whether it holds."""

    text: str
    mean: float
    margin: float | None
    holds: bool | None
    """None: not decided."""


def paper_figure(bars: Sequence[ClaimBar], path: Path) -> None:
    """Write a PNG with a line per claim: its mean difference, and the margin to both sides."""
    figure = new_figure((7.6, 1.2 + 0.27 * len(bars)), 100)
    figure.set_layout_engine("constrained")
    panel = figure.subplots()
    panel.axvline(0, color=DARK, linewidth=0.8)
    for row, bar in enumerate(bars):
        colour = {True: BLUE, False: ORANGE, None: GREY}[bar.holds]
        panel.errorbar(
            [bar.mean],
            [row],
            xerr=[bar.margin or 0.0],
            marker="o",
            markersize=5,
            capsize=3,
            color=colour,
            linewidth=1.4,
        )
    panel.set_yticks(range(len(bars)), [bar.text for bar in bars], fontsize=7)
    panel.set_ylim(len(bars) - 0.5, -0.5)
    panel.set_xlabel("points of top-1; above 0: as the paper says", fontsize=9)
    for colour, label in ((BLUE, "same direction"), (GREY, "not decided"), (ORANGE, "not")):
        panel.plot([], [], "o", color=colour, label=label)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    save_png(figure, path)
