"""Gaussian blur of some images, as in SimCLR and MoCo v3 (Chen et al., arXiv 2104.02057)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.arrays import Float32Array, Float64Array
from data_pipeline.augment.kinds import Augmentation

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

DRAWS = 2  # numbers in [0, 1) drawn for an image: whether it is blurred, and how much
SIDE = 224  # px: the shorter side of an image that the kind's sigma is for
UNBLURRED = 0.01  # px: at this sigma the filter is 1 at its centre, and DALI takes no 0


def draw_blur(kind: Augmentation, draws: Float64Array) -> Float32Array:
    """Return the standard deviation of each image's filter, float32 [n], as a share of its shorter side; 0: no blur.

    From draws [n, DRAWS] in [0, 1).
    """
    low, high = kind.sigma
    sigma = (low + (high - low) * draws[:, 1]) / SIDE
    return np.where(draws[:, 0] < kind.blur, sigma, 0).astype(np.float32)


def blur_images(images: DataNode, sigma: DataNode) -> DataNode:
    """Blur uint8 images, in a DALI graph, by filters of `sigma` px, at least UNBLURRED, on the host."""
    from nvidia.dali import fn

    return fn.gaussian_blur(images, sigma=sigma)
