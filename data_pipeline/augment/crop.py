"""Crop and resize: torchvision's RandomResizedCrop, fixed-size crops, and scale jitter; cubic with antialias."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from data_pipeline.arrays import Float32Array, Float64Array, Int32Array, Int64Array
from data_pipeline.augment.kinds import Augmentation
from data_pipeline.image_size import ImageSize, height_and_width

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

EVALUATION_CROP = 0.875  # 224 of 256, the share of the shorter side that a fixed-size crop keeps
ATTEMPTS = 10  # of torchvision's RandomResizedCrop, before it falls back to the centre of the image
DRAWS = 4 * ATTEMPTS  # numbers in [0, 1) drawn for an image


def draw_crops(
    kind: Augmentation, draws: Float64Array, heights: Int32Array, widths: Int32Array, image_size: ImageSize
) -> tuple[Int32Array, Float32Array, Int32Array]:
    """Return crops int32 [n, 4], regions float32 [n, 4] and filled int32 [n, 2] of a batch's plan.

    draws [n, DRAWS] in [0, 1).
    """
    output = np.array(height_and_width(image_size))
    filled = np.tile(output.astype(np.int32), (len(draws), 1))
    if kind.crop == "random_resized":
        crops = random_resized_crops(draws, heights, widths, kind.scale, kind.ratio)
        regions = np.concatenate([np.zeros_like(crops[:, :2]), crops[:, 2:]], axis=1)
        return crops, regions.astype(np.float32), filled
    size = np.stack([heights, widths], axis=1).astype(np.int64)
    whole = np.concatenate([np.zeros_like(size), size], axis=1).astype(np.int32)
    if kind.crop == "whole":
        return whole, whole.astype(np.float32), filled
    if kind.crop == "scaled":
        scaled = scaled_regions(draws[:, :3], size, kind.scale, int(output[0]), by_shorter=kind.by_shorter)
        return whole, *scaled
    if kind.crop == "unbounded":
        fitted = _resized(size, int(output[0]) / size.min(axis=1, keepdims=True))
        return whole, whole.astype(np.float32), fitted.astype(np.int32)
    resized = covering(size, image_size)
    room = resized - output
    centre = kind.crop == "centre"
    # np.rint, as torchvision's int(round(...)), rounds half to even
    offset = np.rint(room / 2) if centre else np.floor(draws[:, :2] * (room + 1))
    start = offset * size / resized
    end = (offset + output) * size / resized
    return whole, np.concatenate([start, end], axis=1).astype(np.float32), filled


def covering(size: Int64Array, image_size: ImageSize) -> Int64Array:
    """Return the sizes int64 [n, 2] to which images of `size` int64 [n, 2] are resized before a fixed-size crop.

    Sizes are (height, width). Proportions are kept, and an image just covers int(height / 0.875) x int(width / 0.875)
    of the output: one of its sides is equal, the other, rounded down, at least as long, so that no crop reaches beyond
    it. For a square output that is torchvision's Resize(int(side / 0.875)) of the shorter side.
    """
    least = np.array([int(side / EVALUATION_CROP) for side in height_and_width(image_size)])
    by_height = least[0] * size[:, 1] >= least[1] * size[:, 0]
    numerator = np.where(by_height, least[0], least[1])
    return numerator[:, None] * size // np.where(by_height, size[:, 0], size[:, 1])[:, None]


def scaled_regions(
    draws: Float64Array,
    size: Int64Array,
    scale: tuple[float, float],
    image_size: int,
    *,
    by_shorter: bool = False,
) -> tuple[Float32Array, Int32Array]:
    """Return the regions float32 [n, 4] and filled int32 [n, 2] of large-scale jitter.

    Source: Ghiasi et al., arXiv 2012.07177. draws [n, 3] in [0, 1); size [n, 2] (height, width). An image is resized so
    that it just fits into a square of image_size times a factor from `scale`; of what is then larger than image_size a
    part is taken, at the same share of the room in both directions, as detectron2 does. by_shorter: its shorter side is
    resized to image_size times the factor, and the part lies anywhere, as mmsegmentation has it.
    """
    factor = scale[0] + (scale[1] - scale[0]) * draws[:, :1]
    side = size.min(axis=1, keepdims=True) if by_shorter else size.max(axis=1, keepdims=True)
    resized = _resized(size, image_size * factor / side)
    filled = np.minimum(resized, image_size)
    start = np.rint((resized - filled) * (draws[:, 1:] if by_shorter else draws[:, 1:2]))
    regions = np.concatenate([start, start + filled], axis=1) * np.tile(size / resized, 2)
    return regions.astype(np.float32), filled.astype(np.int32)


def _resized(size: Int64Array, factor: Float64Array) -> Float64Array:
    """Return sizes [n, 2] times a factor [n, 1], in whole pixels."""
    return np.maximum(np.rint(size * factor), 1)


def random_resized_crops(
    draws: Float64Array, heights: Int32Array, widths: Int32Array, scale: tuple[float, float], ratio: tuple[float, float]
) -> Int32Array:
    """Return the crops of torchvision's RandomResizedCrop.get_params for n images: int32 [n, 4] (y, x, height, width).

    `draws` float64 [n, 40] in [0, 1): area, log-ratio, y and x of each of ten attempts; the first that fits
    is used, otherwise the largest central crop whose ratio is allowed.
    """
    height, width = heights.astype(np.int64), widths.astype(np.int64)
    boxes = attempted_boxes(draws, height, width, scale, ratio)
    sides = boxes[:, :, 2:]
    fits = np.all((sides > 0) & (sides <= np.stack([height, width], axis=1)[:, None]), axis=2)
    found = boxes[np.arange(len(boxes)), np.argmax(fits, axis=1)]

    in_ratio = width / height
    h = np.where(in_ratio < min(ratio), np.rint(width / min(ratio)).astype(np.int64), height)
    w = np.where(in_ratio > max(ratio), np.rint(height * max(ratio)).astype(np.int64), width)
    middle = np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
    return np.where(np.any(fits, axis=1)[:, None], found, middle).astype(np.int32)


def attempted_boxes(
    draws: Float64Array, height: Int64Array, width: Int64Array, scale: tuple[float, float], ratio: tuple[float, float]
) -> Int64Array:
    """Return boxes int64 [n, 10, 4] (y, x, height, width) of draws [n, 40], including those that do not fit into images
    of `height` [n] x `width` [n]."""
    area, log_ratio, y, x = np.moveaxis(draws.reshape(len(draws), ATTEMPTS, 4), 2, 0)
    height, width = height[:, None], width[:, None]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * log_ratio)
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    y = np.floor(y * (height - h + 1)).astype(np.int64)
    x = np.floor(x * (width - w + 1)).astype(np.int64)
    return np.stack([y, x, h, w], axis=2)


def resize_crop(images: DataNode, start: DataNode, end: DataNode, size: list[int] | DataNode) -> DataNode:
    """Resize, in a DALI graph, the region from `start` to `end` (y, x in pixels of `images`, fractions allowed) to
    `size` (height, width); pixels around the region contribute to the filter."""
    from nvidia.dali import fn
    from nvidia.dali.types import DALIInterpType

    resized = fn.resize(
        images,
        size=size,
        interp_type=DALIInterpType.INTERP_CUBIC,
        antialias=True,
        roi_start=start,
        roi_end=end,
    )
    return cast("DataNode", resized)  # a pair only with save_attrs, which is off
