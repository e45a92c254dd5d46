"""Horizontal flip."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.arrays import Float64Array, Int32Array

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

DRAWS = 1  # numbers in [0, 1) drawn for an image


def draw_flips(probability: float, draws: Float64Array) -> Int32Array:
    """Return int32 [n], 1 for images to be mirrored, from draws [n, DRAWS] in [0, 1)."""
    return (draws[:, 0] < probability).astype(np.int32)


def flip_images(images: DataNode, mirror: DataNode) -> DataNode:
    """Mirror, in a DALI graph, the images whose `mirror` is 1."""
    from nvidia.dali import fn

    return fn.flip(images, horizontal=mirror)
