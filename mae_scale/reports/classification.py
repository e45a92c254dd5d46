"""Figures of a classifier: accuracy per class, attention, nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mae_scale.reports.style import BLUE, DARK, ORANGE, Array, as_array, new_figure, pictures_of, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG = "#159a63", "#d1432f"
MOST_BARS = 40  # with more classes: a curve, and bars for the classes at its ends
NAMED_AT_AN_END = 10
HEADS_SHOWN = 4
MAP_COLOURS = "magma"


def per_class_figure(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG of the top-1 accuracy of each class, sorted, with that of all images as a line.

    `report`: as `mae_scale.tasks.classification.measure.report` returns it. Up to 40 classes are bars with names; more
    are a sorted curve, with bars for the ten worst and the ten best.
    """
    classes = sorted(report["per_class"], key=lambda one: one["top1"])
    if len(classes) <= MOST_BARS:
        figure = new_figure((8, 1.6 + 0.28 * len(classes)), 120)
        axes = figure.subplots()
        _bars(axes, classes)
    else:
        figure = new_figure((12, 6), 120)
        grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
        axes = figure.add_subplot(grid[:, 0])
        axes.plot(range(1, len(classes) + 1), [one["top1"] for one in classes], color=BLUE, linewidth=1.6)
        axes.set_xlabel(f"{len(classes):,} classes, from the worst to the best")
        axes.set_ylabel("top-1 accuracy (%)")
        axes.set_ylim(0, 103)
        axes.margins(x=0.01)
        axes.grid(color="#dddddd", linewidth=0.6)
        ends = {"worst": classes[:NAMED_AT_AN_END], "best": classes[-NAMED_AT_AN_END:]}
        for row, (name, some) in enumerate(ends.items()):
            beside = figure.add_subplot(grid[row, 1])
            _bars(beside, some)
            beside.set_title(f"the {len(some)} {name}", fontsize=10, loc="left")
            beside.spines[["top", "right"]].set_visible(False)
    line = axes.axvline if len(classes) <= MOST_BARS else axes.axhline
    line(report["top1"], color=ORANGE, linewidth=1.4, linestyle="--")
    axes.set_title(f"{report['top1']:.1f} % of all {report['images']:,} images (dashed)", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_png(figure, path)


def _bars(axes: Axes, classes: Sequence[Mapping[str, Any]]) -> None:
    """Draw a bar per class, the first at the bottom, with its accuracy and its number of images."""
    values = [one["top1"] for one in classes]
    axes.barh(range(len(classes)), values, color=BLUE, height=0.72)
    axes.set_yticks(range(len(classes)), [_short(one["class"]) for one in classes], fontsize=9)
    axes.tick_params(axis="y", length=0)
    for row, one in enumerate(classes):
        axes.text(102, row, f"{one['top1']:.1f} % of {one['images']:,}", va="center", fontsize=8, color=DARK)
    axes.set_xlim(0, 124)
    axes.set_xticks(range(0, 101, 20))
    axes.set_ylim(-0.7, len(classes) - 0.3)
    axes.set_xlabel("top-1 accuracy (%)")


def attention_figure(images: Array, attention: Array, path: Path, patch_size: int) -> None:
    """Write a PNG of N images, one per row: the image, its attention as the mean over the heads, and some heads.

    `images` [N, 3, H, W], normalised by ImageNet's mean and standard deviation; `attention` [N, heads, L], as
    `mae_scale.models.attention.last_attention` returns it; NumPy arrays or torch tensors. Each map is scaled from 0 to
    its own largest value. Raises ValueError when shapes do not belong together.
    """
    pictures, attention = pictures_of(images), as_array(attention)
    count, *size = pictures.shape[:3]
    heads, grid = attention.shape[1], [side // patch_size for side in size]
    if attention.shape != (count, heads, math.prod(grid)):
        raise ValueError(
            f"{count} images of {size[0]} x {size[1]} px in patches of {patch_size} px need attention "
            f"[{count}, heads, {math.prod(grid)}], found {attention.shape}"
        )
    shown = np.unique(np.linspace(0, heads - 1, min(heads, HEADS_SHOWN)).round().astype(int))
    maps = np.concatenate([attention.mean(1, keepdims=True), attention[:, shown]], axis=1)  # [N, 1 + shown, L]
    titles = ["image", "mean of heads", *(f"head {head + 1} of {heads}" for head in shown)]
    figure, axes = _tiles(count, len(titles))
    for row in range(count):
        axes[row, 0].imshow(pictures[row])
        for column, one in enumerate(maps[row], start=1):
            axes[row, column].imshow(
                one.reshape(grid), cmap=MAP_COLOURS, vmin=0, vmax=one.max() or 1, interpolation="spline16"
            )
    for column, title in enumerate(titles):
        axes[0, column].set_title(title, fontsize=10, color=DARK)
    save_png(figure, path)


def neighbours_figure(
    queries: Array,
    neighbours: Array,
    query_labels: Array,
    neighbour_labels: Array,
    *,
    class_names: Sequence[str],
    path: Path,
) -> None:
    """Write a PNG of N images, one per row, with their k nearest training images, the nearest first.

    `queries` [N, 3, H, W] and `neighbours` [N, k, 3, H, W], normalised by ImageNet's mean and standard deviation;
    their labels int [N] and [N, k] are indices into `class_names`; NumPy arrays or torch tensors. A neighbour of the
    right class has a green frame, one of another class a red frame and its name in red.
    """
    pictures = pictures_of(queries)
    nearest = [pictures_of(some) for some in neighbours]
    figure, axes = _tiles(len(pictures), 1 + len(nearest[0]), caption=True)
    for row, label in enumerate(query_labels):
        _captioned(axes[row, 0], pictures[row], class_names[int(label)], DARK)
        for column, other in enumerate(neighbour_labels[row], start=1):
            colour = RIGHT if int(other) == int(label) else WRONG
            _captioned(axes[row, column], nearest[row][column - 1], class_names[int(other)], colour)
            _frame(axes[row, column], colour)
    axes[0, 0].set_title("image", fontsize=10, color=DARK)
    axes[0, 1].set_title("nearest, from the left", fontsize=10, color=DARK, loc="left")
    save_png(figure, path)


def _captioned(axes: Axes, picture: np.ndarray, name: str, colour: str) -> None:
    axes.imshow(picture)
    axes.set_xlabel(_short(name, 18), fontsize=8, color=colour, labelpad=3)


def _frame(axes: Axes, colour: str) -> None:
    axes.spines[:].set(visible=True, color=colour, linewidth=3)


def _tiles(rows: int, columns: int, caption: bool = False) -> tuple[Figure, np.ndarray]:
    """Return a figure and its square axes [rows, columns], without ticks or frames.

    caption: leave room for a line of text below each.
    """
    tile, gap, line, top = 1.25, 0.08, 0.24 if caption else 0.0, 0.35  # inches
    width = columns * (tile + gap) + gap
    height = top + rows * (tile + gap + line) + gap
    figure = new_figure((width, height), 120)
    axes = np.empty((rows, columns), dtype=object)
    for row in range(rows):
        bottom = height - top - row * (tile + gap + line) - tile
        for column in range(columns):
            left = gap + column * (tile + gap)
            one = figure.add_axes((left / width, bottom / height, tile / width, tile / height))
            one.set(xticks=[], yticks=[])
            one.spines[:].set_visible(False)
            axes[row, column] = one
    return figure, axes


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
