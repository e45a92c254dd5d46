"""Solarisation of some images, as Pillow's ImageOps.solarize: levels from 128 on become their negative."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.arrays import Float64Array, Int32Array
from data_pipeline.augment.kinds import Augmentation

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

DRAWS = 1  # numbers in [0, 1) drawn for an image
THRESHOLD, NEVER = 128, 256


def draw_thresholds(kind: Augmentation, draws: Float64Array) -> Int32Array:
    """Return the level from which on each image is turned into its negative, int32 [n], from draws [n, DRAWS]."""
    return np.where(draws[:, 0] < kind.solarised, THRESHOLD, NEVER).astype(np.int32)


def solarise_images(images: DataNode, thresholds: DataNode) -> DataNode:
    """Replace, in a DALI graph, the levels v of uint8 images from each one's threshold on by 255 - v."""
    from nvidia.dali.types import Constant, DALIDataType

    return images ^ ((images >= thresholds) * Constant(255, dtype=DALIDataType.UINT8))
