"""The figure of partial fine-tuning: accuracy against the number of trained blocks."""

from collections.abc import Sequence
from pathlib import Path

from mae_scale.reports.style import BLUE, GREY, new_figure, save_png


def partial_curve_figure(points: Sequence[tuple[float, float, float | None]], path: Path, *, depth: int) -> None:
    """Write a PNG of accuracy against the number of trained blocks, as figure 9 of He et al. (arXiv 2111.06377).

    `points`: (trained blocks, top-1 percent, its standard deviation or None), drawn at equal distances in the order of
    their blocks. Where the last one trains all `depth` blocks, a dashed line marks it: full fine-tuning.
    """
    points = sorted(points, key=lambda point: point[0])
    blocks, accuracies = [point[0] for point in points], [point[1] for point in points]
    figure = new_figure((7, 4.4), 120)
    axes = figure.subplots()
    if blocks[-1] == depth:
        axes.axhline(accuracies[-1], color=GREY, linewidth=1.2, linestyle="--", zorder=1)
        axes.annotate(
            f"full fine-tuning {accuracies[-1]:.1f}",
            (0, accuracies[-1]),
            xytext=(0, 4),
            textcoords="offset points",
            fontsize=9,
            color="#555555",
        )
    places = range(len(points))
    axes.plot(places, accuracies, color=BLUE, linewidth=1.6, marker="o", markersize=5)
    for place, (_, top1, std) in enumerate(points):
        if std is not None:
            axes.errorbar(place, top1, yerr=std, color=BLUE, capsize=3, linewidth=1.2)
        axes.annotate(
            f"{top1:.1f}",
            (place, top1 - (std or 0)),
            xytext=(4, -13),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_xticks(places, [f"{one:g}" for one in blocks])
    axes.set_xlabel(f"trained blocks, of {depth}")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.margins(x=0.06, y=0.15)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_png(figure, path)
