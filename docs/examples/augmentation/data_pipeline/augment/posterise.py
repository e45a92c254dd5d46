"""Posterisation, one of AutoAugment's operations (Cubuk et al., arXiv 1805.09501): levels lose their lower bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.augment.kinds import Augmentation

if TYPE_CHECKING:
    from nvidia.dali.pipeline import DataNode

DRAWS = 1  # numbers in [0, 1) drawn for an image
KEPT, ALL = 0b11100000, 0b11111111


def draw_bits(kind: Augmentation, draws: np.ndarray) -> np.ndarray:
    """Return the bits int32 [n] of its levels that each image keeps, ALL for most, from draws [n, DRAWS]."""
    return np.where(draws[:, 0] < kind.posterised, KEPT, ALL).astype(np.int32)


def posterise_images(images: DataNode, bits: DataNode) -> DataNode:
    """Set, in a DALI graph, the bits of uint8 images' levels that are not in `bits` to 0."""
    from nvidia.dali import fn, types

    return images & fn.cast(bits, dtype=types.UINT8)
