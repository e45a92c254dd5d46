"""Put an image's objects where a plan puts its pixels: boxes, and masks rasterised after the crop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

from data_pipeline.annotations.masks import boxes_of, mask_of
from data_pipeline.annotations.objects import Objects
from data_pipeline.arrays import Float32Array, Float64Array, Int32Array, Int64Array, Uint8Array

SMALLEST_PX = 1e-5
"""Sides of boxes up to which nothing of an object is left, as detectron2 has it."""


@dataclass(frozen=True)
class Placing:
    """The map from pixels of a stored image to those of the square output: scale, then shift, cut, then mirror.

    `scale` and `shift` float64 [2] (y, x); `filled` (height, width), which the image fills; `flip`: mirrored in it.
    """

    scale: Float64Array
    shift: Float64Array
    filled: tuple[int, int]
    flip: bool

    @classmethod
    def of(cls, region: Float32Array, filled: Int32Array, flip: int) -> Placing:
        """Return that of a row of a plan whose crop is the whole image."""
        start, end = region[:2].astype(np.float64), region[2:].astype(np.float64)
        scale = filled / (end - start)
        return cls(scale, -start * scale, (int(filled[0]), int(filled[1])), bool(flip))

    def points(self, points: Float32Array) -> Float64Array:
        """Return points (x, y) [..., 2] of the output; not cut."""
        moved = points * self.scale[::-1] + self.shift[::-1]
        if self.flip:
            moved[..., 0] = self.filled[1] - moved[..., 0]
        return moved

    def boxes(self, boxes: Float32Array) -> Float32Array:
        """Return boxes [n, 4] (x0, y0, x1, y1) of the output, cut at what the image fills."""
        corners = self.points(boxes.reshape(-1, 2, 2))
        low, high = corners.min(axis=1), corners.max(axis=1)
        edge = np.array(self.filled[::-1])
        return np.concatenate([np.clip(low, 0, edge), np.clip(high, 0, edge)], axis=1).astype(np.float32)

    def mask(self, objects: Objects, row: int, height: int, width: int) -> Uint8Array:
        """Return an object's mask, uint8 of the size `filled`; the image is stored with `height` x `width` px.

        Polygons are moved and then rasterised; run lengths are sampled at the output's pixel centres.
        """
        polygons = objects.polygons(row)
        if polygons:
            moved = [self.points(polygon).ravel().tolist() for polygon in polygons]
            return np.asarray(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, *self.filled))))
        return self.sampled(mask_of(objects.run_lengths(row), height, width))

    def sampled(self, stored: Uint8Array) -> Uint8Array:
        """Return values [H, W] of the stored image at the output's pixel centres, [h, w] of the size `filled`."""
        y, x = (
            np.clip(((np.arange(length) + 0.5 - shift) / scale).astype(np.int64), 0, side - 1)
            for length, shift, scale, side in zip(self.filled, self.shift, self.scale, stored.shape, strict=True)
        )
        found = stored[y[:, None], x]
        return found[:, ::-1] if self.flip else found


@dataclass(frozen=True)
class PlacedObjects:
    """The n objects of an image that are left in the output: `boxes` float32 [n, 4], `category` int32 [n], `masks`
    uint8 [n, S, S], `rows` int64 [n] of the objects."""

    boxes: Float32Array
    category: Int32Array
    masks: Uint8Array
    rows: Int64Array


def place(objects: Objects, image: int, placing: Placing, *, height: int, width: int, image_size: int) -> PlacedObjects:
    """Return the objects of an image of `height` x `width` px in the square output of image_size px.

    Crowds are left out: they are no examples of one object (COCO's rule for training). So is what the cut leaves no
    pixel of. Boxes are those of the masks that are left, as a cut object ends at its own last pixel.
    """
    rows = np.arange(objects.of(image).start, objects.of(image).stop, dtype=np.int64)
    rows = rows[~objects.crowd[rows]]
    moved = placing.boxes(objects.boxes[rows])
    rows = rows[(moved[:, 2:] - moved[:, :2]).min(axis=1, initial=np.inf) > SMALLEST_PX]
    masks = np.zeros((len(rows), image_size, image_size), np.uint8)
    for mask, row in zip(masks, rows, strict=True):
        mask[: placing.filled[0], : placing.filled[1]] = placing.mask(objects, int(row), height, width)
    left = masks.any(axis=(1, 2))
    rows, masks = rows[left], masks[left]
    return PlacedObjects(boxes_of(masks), objects.category[rows], masks, rows)
