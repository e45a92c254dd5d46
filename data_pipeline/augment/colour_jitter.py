"""Colour jitter as torchvision's ColorJitter without hue: brightness, contrast and saturation in random order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.arrays import Float32Array, Float64Array, Int32Array

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

DRAWS = 6  # numbers in [0, 1) drawn for an image: three factors, three for their order


def draw_jitter(strength: float, draws: Float64Array) -> tuple[Float32Array, Int32Array]:
    """Return factors float32 [n, 3] of brightness, contrast and saturation, and the order int32 [n, 3] in which they
    are applied, from draws [n, DRAWS] in [0, 1)."""
    factors = (1 - strength + 2 * strength * draws[:, :3]).astype(np.float32)
    return factors, np.argsort(draws[:, 3:], axis=1).astype(np.int32)


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


def jitter_colours(images: DataNode, levels: DataNode, saturation: DataNode) -> DataNode:
    """Colour uint8 RGB images, in a DALI graph, with the factors of `jitter_slots`; clipped to uint8 after each one."""
    from nvidia.dali import fn
    from nvidia.dali.types import DALIDataType, DALIImageType

    for slot in range(4):
        if slot == 2:
            images = fn.saturation(images, saturation=saturation)
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
