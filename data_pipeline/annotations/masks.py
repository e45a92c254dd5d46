"""Masks of objects: run lengths, and the boxes that they fill."""

from __future__ import annotations

import numpy as np

from data_pipeline.arrays import BoolArray, Float32Array, Int32Array, Int64Array, Uint8Array


def run_lengths(mask: BoolArray) -> list[int]:
    """Return the run lengths of a mask bool [h, w], down its columns, outside first (COCO's uncompressed counts)."""
    flat = np.concatenate([[False], mask.T.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    ends = np.concatenate([changes, [mask.size]])
    return np.diff(ends, prepend=0).tolist()


def mask_of(runs: Int32Array, height: int, width: int) -> Uint8Array:
    """Return the mask uint8 [height, width] of run lengths: the inverse of `run_lengths`."""
    return np.repeat(np.arange(len(runs), dtype=np.uint8) & 1, runs).reshape(width, height).T


def boxes_of(masks: Uint8Array | BoolArray) -> Float32Array:
    """Return the box (x0, y0, x1, y1) of each mask [n, h, w], none of them empty: float32 [n, 4]."""
    ends: list[Int64Array] = []
    for axis in (1, 2):  # over the rows, over the columns
        line = np.asarray(masks.any(axis=axis))
        ends += [line.argmax(axis=1), line.shape[1] - line[:, ::-1].argmax(axis=1)]
    x0, x1, y0, y1 = ends
    return np.stack([x0, y0, x1, y1], axis=1).astype(np.float32)
