"""The annotated objects of images, as columns."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from data_pipeline.arrays import BoolArray, Float32Array, Int32Array, Int64Array


@dataclass(frozen=True)
class Objects:
    """The objects of n images; those of image i are rows first[i] to first[i + 1] - 1, in the order of their file.

    `first` int64 [n + 1]; of m objects: `ids` int64 [m], `category` int32 [m] (a row of the list of categories),
    `boxes` float32 [m, 4] (x0, y0, x1, y1 in pixels), `crowd` bool [m]. A mask is either polygons, `polygons_of` int64
    [m + 1] (rows of `points_of`), `points_of` int64 [p + 1] (rows of `points`), `points` float32 [q, 2] (x, y), or,
    with no polygon, run lengths down the columns, outside first: `runs_of` int64 [m + 1] (rows of `runs`), `runs`
    int32 [r].
    """

    first: Int64Array
    ids: Int64Array
    category: Int32Array
    boxes: Float32Array
    crowd: BoolArray
    polygons_of: Int64Array
    points_of: Int64Array
    points: Float32Array
    runs_of: Int64Array
    runs: Int32Array

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, images: Int64Array) -> Objects:
        """Return the objects of these images, in their order; an image -1 has none."""
        first, objects = _gathered(self.first, images)
        polygons_of, polygons = _gathered(self.polygons_of, objects)
        points_of, points = _gathered(self.points_of, polygons)
        runs_of, runs = _gathered(self.runs_of, objects)
        return Objects(
            first=first,
            ids=self.ids[objects],
            category=self.category[objects],
            boxes=self.boxes[objects],
            crowd=self.crowd[objects],
            polygons_of=polygons_of,
            points_of=points_of,
            points=self.points[points],
            runs_of=runs_of,
            runs=self.runs[runs],
        )

    def of(self, image: int) -> slice:
        """Return the rows of an image's objects."""
        return slice(int(self.first[image]), int(self.first[image + 1]))

    def polygons(self, row: int) -> list[Float32Array]:
        """Return an object's polygons, each float32 [points, 2] (x, y); none where its mask is run lengths."""
        ends = self.points_of[int(self.polygons_of[row]) : int(self.polygons_of[row + 1]) + 1]
        return [self.points[begin:end] for begin, end in itertools.pairwise(ends)]

    def run_lengths(self, row: int) -> Int32Array:
        """Return the run lengths of an object's mask, int32 [runs]; none where it is polygons."""
        return self.runs[int(self.runs_of[row]) : int(self.runs_of[row + 1])]


def rows_of(lengths: list[int]) -> Int64Array:
    """Return where each of several pieces of these lengths begins, and where the last ends: int64 [pieces + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(lengths, np.int64), dtype=np.int64)])


def _gathered(ends: Int64Array, pieces: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return where each of the chosen pieces then begins, int64 [k + 1], and the rows of all of them, int64 [rows]."""
    begin = np.where(pieces >= 0, ends[pieces], 0)
    lengths = ends[pieces + 1] - begin  # of the piece -1: ends[0], which is 0
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return first, np.repeat(begin - first[:-1], lengths) + np.arange(first[-1])
