"""Solarisation, as BYOL uses it (Grill et al., arXiv 2006.07733): the bright half of the levels is inverted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nvidia.dali.pipeline import DataNode

DRAWS = 1  # numbers in [0, 1) drawn for an image
THRESHOLD, NEVER = 128, 256


def draw_thresholds(probability: float, draws: np.ndarray) -> np.ndarray:
    """Return the level int32 [n] from which on each image is inverted, NEVER for most, from draws [n, DRAWS]."""
    return np.where(draws[:, 0] < probability, THRESHOLD, NEVER).astype(np.int32)


def solarise_images(images: DataNode, threshold: DataNode) -> DataNode:
    """Invert, in a DALI graph, what of uint8 images is at least as bright as their threshold."""
    from nvidia.dali import types

    white = types.Constant(255, dtype=types.UINT8)  # x ^ white is 255 - x
    return images ^ ((images >= threshold) * white)
