"""The figures of a pre-training run: its reconstructions and its loss curve."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_scale.models.vit import unpatchify
from mae_scale.reports.style import BLUE, GREY, ORANGE, Array, as_array, new_figure, pictures_of, save_png

REMOVED = 0.5  # grey
ROWS = ("original", "masked", "reconstructed")
IMAGES_A_BAND = 8
TITLE_HEIGHT = 44  # pixels
SMALLEST_SIDE = 128  # pixels in the figure; smaller images are enlarged by a whole factor


def reconstruction_figure(
    images: Array, mask: Array, prediction_pixels: Array, path: Path, *, patch_size: int, title: str | None = None
) -> None:
    """Write a PNG of N images, each original, with its removed patches grey, and reconstructed; a title above them.

    `images` [N, 3, H, W] float, normalised by ImageNet's mean and standard deviation; `mask` [N, L], 1 for a
    removed patch; `prediction_pixels` [N, L, p*p*3] float, a patch's values in the order row, column, channel, in
    the space of the normalised images. NumPy arrays or torch tensors, on any device. The visible patches of the
    reconstruction are the original's. Raises ValueError when shapes do not belong together.
    """
    images, mask, prediction = (as_array(value) for value in (images, mask, prediction_pixels))
    count, channels, height, width = images.shape
    grid = height // patch_size, width // patch_size
    expected = (count, math.prod(grid), channels * patch_size**2)
    if prediction.shape != expected or mask.shape != expected[:2]:
        raise ValueError(
            f"images {images.shape} in patches of {patch_size} px need a mask {expected[:2]} and a "
            f"prediction {expected}; found {mask.shape} and {prediction.shape}"
        )
    original = pictures_of(images)
    predicted = pictures_of(unpatchify(torch.from_numpy(prediction), patch_size, grid))
    masked = torch.from_numpy(mask)[:, :, None].expand(-1, -1, patch_size**2)  # [N, L, p*p]
    removed = unpatchify(masked, patch_size, grid).numpy().transpose(0, 2, 3, 1) > 0.5  # [N, H, W, 1]
    bands = (original, np.where(removed, REMOVED, original), np.where(removed, predicted, original))
    _draw_bands([_enlarged(band) for band in bands], path, title)


def words_figure(images: Array, pictures: Array, path: Path, *, title: str | None = None) -> None:
    """Write a PNG of N images, each original and as decoded from its words; a title above them.

    `images` [N, 3, S, S] float, normalised by ImageNet's mean and standard deviation; `pictures` [N, 3, S, S] from 0
    to 1. NumPy arrays or torch tensors, on any device.
    """
    bands = (pictures_of(images), as_array(pictures).transpose(0, 2, 3, 1))
    _draw_bands([_enlarged(band) for band in bands], path, title, ("original", "from words"))


def _enlarged(pictures: np.ndarray) -> np.ndarray:
    """Return pictures [N, H, W, 3], of small ones a square of equal pixels for each pixel."""
    factor = math.ceil(SMALLEST_SIDE / min(pictures.shape[1:3]))
    return pictures.repeat(factor, axis=1).repeat(factor, axis=2)


def _draw_bands(pictures: Sequence[np.ndarray], path: Path, title: str | None, rows: Sequence[str] = ROWS) -> None:
    """Draw up to eight images side by side in rows, the next eight below; one figure pixel per image pixel."""
    count, height, width, _ = pictures[0].shape
    columns = min(count, IMAGES_A_BAND)
    bands = math.ceil(count / columns)
    gap, band_gap, label_width, dpi = max(4, height // 32), max(12, height // 8), 150, 100
    head = TITLE_HEIGHT if title else gap
    canvas_height = head + bands * (len(rows) * (height + gap) + band_gap) - band_gap
    canvas_width = label_width + columns * (width + gap)
    canvas = np.ones((canvas_height, canvas_width, 3), dtype=np.float32)
    labels = []
    for band in range(bands):
        for row, name in enumerate(rows):
            top = head + band * (len(rows) * (height + gap) + band_gap) + row * (height + gap)
            labels.append((top + height / 2, name))
            for column, picture in enumerate(pictures[row][band * columns : (band + 1) * columns]):
                left = label_width + column * (width + gap)
                canvas[top : top + height, left : left + width] = picture
    figure = new_figure((canvas_width / dpi, canvas_height / dpi), dpi)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.axis("off")
    for y, name in labels:
        axes.text(label_width - 12, y, name, ha="right", va="center", fontsize=13, color="#222222")
    if title:
        axes.text(label_width, head / 2, title, ha="left", va="center", fontsize=13, color="#222222")
    save_png(figure, path)


def loss_curve_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of the loss against the epoch, in training and validation, the learning rate below it.

    `rows`: as `read_metrics` returns them. Values that are not finite are left out.
    """
    figure = new_figure((8, 5.5), 120)
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curves = (
        (loss_axes, "train/loss", "training", BLUE),
        (loss_axes, "val/loss", "validation", ORANGE),
        (lr_axes, "train/lr", "", GREY),
    )
    for axes, name, label, colour in curves:
        points = [(row["epoch"], row[name]) for row in rows if _is_finite(row.get(name))]
        if points:
            marker = "." if len(points) < 3 else None
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, marker=marker, label=label)
    loss_axes.set_ylabel("loss")
    if loss_axes.lines:
        loss_axes.legend(frameon=False)
    lr_axes.set_ylabel("learning rate")
    for axes in (loss_axes, lr_axes):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    lr_axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    lr_axes.set_ylim(bottom=0)
    lr_axes.set_xlabel("epoch")
    figure.align_ylabels()
    figure.tight_layout()
    save_png(figure, path)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
