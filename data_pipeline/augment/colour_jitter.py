"""Colour jitter as torchvision's ColorJitter, brightness, contrast and saturation in random order; hue; grey images.

Hue is turned with the saturation and about the grey axis, which keeps the luma; Pillow and torchvision turn it in HSV,
which keeps the largest of the three colours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.arrays import Float32Array, Float64Array, Int32Array
from data_pipeline.augment.kinds import Augmentation

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

DRAWS = 6  # numbers in [0, 1) drawn for an image: three factors, three for their order
HUE_DRAWS = (
    3  # and of a kind with hue, a probability or grey images: the hue, whether it is jittered, whether it is grey
)


def draw_jitter(kind: Augmentation, draws: Float64Array) -> tuple[Float32Array, Int32Array]:
    """Return factors float32 [n, 3] of brightness, contrast and saturation, and the order int32 [n, 3] in which they
    are applied, from draws [n, DRAWS] in [0, 1)."""
    strengths = np.array(kind.jitter[:3])
    factors = (1 - strengths + 2 * strengths * draws[:, :3]).astype(np.float32)
    return factors, np.argsort(draws[:, 3:], axis=1).astype(np.int32)


def draw_hue(kind: Augmentation, factors: Float32Array, draws: Float64Array) -> tuple[Float32Array, Float32Array]:
    """Return factors float32 [n, 3] and hue float32 [n] in degrees, from those of `draw_jitter` and draws [n,
    HUE_DRAWS] in [0, 1): no change for images that are not jittered, and saturation 0 for grey ones."""
    jittered, grey = draws[:, 1] < kind.jittered, draws[:, 2] < kind.grey
    factors = np.where(jittered[:, None], factors, 1).astype(np.float32)
    factors[grey, 2] = 0
    hue = 360 * kind.jitter[3] * (2 * draws[:, 0] - 1)
    return factors, np.where(jittered, hue, 0).astype(np.float32)


def jitter_slots(factors: Float32Array, order: Int32Array) -> tuple[Float32Array, Float32Array]:
    """Return levels float32 [n, 4, 2] and saturation float32 [n] of factors [n, 3] applied in order [n, 3].

    Brightness and contrast fall before or after saturation, each side in their order: slots 0 and 1 come
    before it, 2 and 3 after. A slot multiplies by its first number and adds (its second number) x the mean
    grey.
    """
    n = len(factors)
    levels = np.tile(np.array([1, 0], np.float32), (n, 4, 1))
    place = np.argsort(order, axis=1)  # place[i, k]: when operation k is applied; 0 brightness, 1 contrast
    for operation in (0, 1):
        factor = factors[:, operation]
        slot = np.where(place[:, operation] < place[:, 2], place[:, operation], 1 + place[:, operation])
        levels[np.arange(n), slot, 0] = factor
        levels[np.arange(n), slot, 1] = (1 - factor) * operation
    return levels, factors[:, 2].astype(np.float32)


def jitter_colours(images: DataNode, levels: DataNode, saturation: DataNode, hue: DataNode) -> DataNode:
    """Colour uint8 RGB images, in a DALI graph, with the factors of `jitter_slots` and hue in degrees; clipped to uint8
    after each one."""
    from nvidia.dali import fn
    from nvidia.dali.types import DALIDataType, DALIImageType

    for slot in range(4):
        if slot == 2:
            images = fn.hsv(images, saturation=saturation, hue=hue)
        grey = fn.color_space_conversion(images, image_type=DALIImageType.RGB, output_type=DALIImageType.GRAY)
        mean = fn.reductions.mean(grey).cpu()  # arguments of operators are read on the host
        images = fn.brightness_contrast(
            images,
            contrast=levels[slot, 0],
            contrast_center=0.0,
            brightness_shift=levels[slot, 1] * mean / 255.0,
            dtype=DALIDataType.UINT8,
        )
    return images
