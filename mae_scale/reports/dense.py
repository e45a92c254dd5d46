"""Figures of detection and segmentation: annotated and predicted objects, or classes of pixels, over images."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mae_scale.reports.style import DARK, new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TILE, GAP, HEADING, LINE = 2.1, 0.08, 0.3, 0.2  # inches
OPACITY = 0.5
GOLDEN = 0.618034  # hues that follow each other by this share of the circle are far from one another
NO_CLASS = (90, 90, 90)
NAMES_A_LINE = 8


@dataclass(frozen=True)
class DrawnObject:
    """An object over an image of H x W px: its box (x0, y0, x1, y1), its mask bool [H, W], a number for its colour, and
    its caption."""

    box: tuple[float, float, float, float]
    mask: np.ndarray
    kind: int
    caption: str


def class_colours(count: int) -> np.ndarray:
    """Return a colour for each of `count` classes, uint8 [count, 3], the same for a class whatever the count."""
    rows = [colorsys.hsv_to_rgb(number * GOLDEN % 1, (0.85, 0.55)[number % 2], 0.95) for number in range(count)]
    return np.rint(255 * np.array(rows).reshape(-1, 3)).astype(np.uint8)


def objects_figure(
    pictures: Sequence[np.ndarray], rows: Sequence[tuple[str, Sequence[Sequence[DrawnObject]]]], path: Path
) -> None:
    """Write a PNG of images, uint8 [H, W, 3] each; below each other, under their titles, with each row's objects."""
    figure, axes = _grid(len(rows), pictures, [title for title, _ in rows], legend_lines=0)
    for line, (_, of_images) in zip(axes, rows, strict=True):
        for one, picture, objects in zip(line, pictures, of_images, strict=True):
            _draw_objects(one, picture, objects)
    save_png(figure, path)


def classes_figure(
    pictures: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    predicted: Sequence[np.ndarray],
    path: Path,
    *,
    names: Sequence[str],
) -> None:
    """Write a PNG of images, uint8 [H, W, 3] each, their label maps and what was predicted, int [H, W]; a legend below.

    A number that is no class, such as that of pixels without a label, is grey.
    """
    shown = sorted({int(k) for maps in (labels, predicted) for one in maps for k in np.unique(one) if k < len(names)})
    columns = min(NAMES_A_LINE, max(1, 2 * len(pictures)))
    lines = -(-len(shown) // columns)
    figure, axes = _grid(3, pictures, ["image", "annotated", "predicted"], legend_lines=lines)
    for column, picture in enumerate(pictures):
        axes[0][column].imshow(picture)
        axes[1][column].imshow(coloured(labels[column], len(names)))
        axes[2][column].imshow(coloured(predicted[column], len(names)))
    colours = class_colours(len(names)) / 255
    width, height = figure.get_size_inches()
    for number, kind in enumerate(shown):
        x = (0.1 + (number % columns) * (width - 0.1) / columns) / width
        y = (LINE * (lines - number // columns) - 0.05) / height
        figure.text(x, y, "■", color=colours[kind], fontsize=10, va="top")
        figure.text(x + 0.16 / width, y, _short(names[kind]), color=DARK, fontsize=8, va="top")
    save_png(figure, path)


def coloured(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the colours uint8 [H, W, 3] of a map of classes int [H, W]; grey where a number is no class."""
    palette = np.concatenate([class_colours(classes), np.array([NO_CLASS], np.uint8)])
    return palette[np.minimum(labels, classes)]


def _draw_objects(axes: Axes, picture: np.ndarray, objects: Sequence[DrawnObject]) -> None:
    colours = class_colours(max((one.kind for one in objects), default=0) + 1)
    shown = picture.astype(np.float32)
    for one in objects:
        shown[one.mask] = (1 - OPACITY) * shown[one.mask] + OPACITY * colours[one.kind]
    axes.imshow(np.rint(shown).astype(np.uint8))
    for one in objects:
        x0, y0, x1, y1 = one.box
        colour = colours[one.kind] / 255
        axes.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=colour, linewidth=1.2)
        axes.text(
            x0, y0, one.caption, fontsize=6, color="white", va="bottom", clip_on=True,
            bbox={"facecolor": tuple(0.7 * colour), "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    axes.set_xlim(0, picture.shape[1])
    axes.set_ylim(picture.shape[0], 0)


def _grid(rows: int, pictures: Sequence[np.ndarray], titles: Sequence[str], *, legend_lines: int):  # type: ignore[no-untyped-def]
    """Return a figure and its axes, a list for each row, one for each picture; each row under its title."""
    height = rows * (TILE + HEADING) + GAP + LINE * legend_lines
    width = len(pictures) * (TILE + GAP) + GAP
    figure = new_figure((width, height), 130)
    axes = []
    for row, title in enumerate(titles):
        bottom = height - (row + 1) * (TILE + HEADING)
        figure.text(GAP / width, (bottom + TILE + 0.06) / height, title, fontsize=10, color=DARK)
        line = []
        for column in range(len(pictures)):
            left = GAP + column * (TILE + GAP)
            one = figure.add_axes((left / width, bottom / height, TILE / width, TILE / height))
            one.set(xticks=[], yticks=[])
            one.spines[:].set_visible(False)
            line.append(one)
        axes.append(line)
    return figure, axes


def _short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
