"""Random erasing as timm's RandomErasing (Zhong et al., 2017): a box of the normalised image filled with noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.arrays import Float32Array, Float64Array, Int32Array, Int64Array
from data_pipeline.augment.crop import DRAWS as BOX_DRAWS
from data_pipeline.augment.crop import attempted_boxes
from data_pipeline.image_size import ImageSize, height_and_width
from data_pipeline.rng import generator

if TYPE_CHECKING:
    import torch

ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)
Patch = tuple[tuple[int, slice, slice, slice], Float32Array]
"""A box of images [n, 3, H, W], and the noise [3, height, width] that is written there."""
DRAWS = 1 + BOX_DRAWS  # numbers in [0, 1) drawn for an image


def erasing_boxes(draws: Float64Array, image_size: ImageSize, probability: float) -> Int32Array:
    """Return the boxes of n images: int32 [n, 4] (y, x, height, width), 0 for none.

    `draws` float64 [n, DRAWS] in [0, 1): whether to erase, then as for random resized crops; the first of ten
    attempts that is smaller than the image is used, and without one nothing is erased.
    """
    output = height_and_width(image_size)
    heights, widths = (np.full(len(draws), side) for side in output)
    boxes = attempted_boxes(draws[:, 1:], heights, widths, ERASED_AREA, ERASED_RATIO)
    fits = np.all(boxes[:, :, 2:] < output, axis=2)
    found = boxes[np.arange(len(boxes)), np.argmax(fits, axis=1)]
    erased = (draws[:, 0] < probability) & np.any(fits, axis=1)
    return np.where(erased[:, None], found, 0).astype(np.int32)


def erasing_noise(boxes: Int32Array, positions: Int64Array, *, seed: int, number: int) -> list[Patch]:
    """Return, for each box of [n, 4] that is not empty, its place in images [n, 3, H, W] and float32 [3, height, width]
    of standard normal noise, which belongs to the image's position in global batch `number`."""
    patches = []
    for row in np.flatnonzero(boxes[:, 2]):
        y, x, height, width = boxes[row].tolist()
        random = generator(seed, "erasing", number, int(positions[row]))
        place = int(row), slice(None), slice(y, y + height), slice(x, x + width)
        patches.append((place, random.standard_normal((3, height, width), np.float32)))
    return patches


def erase(images: torch.Tensor, patches: list[Patch]) -> torch.Tensor:
    """Write `patches` over images [n, 3, H, W], in place, and return them."""
    import torch

    for place, noise in patches:
        images[place] = torch.from_numpy(noise)
    return images
