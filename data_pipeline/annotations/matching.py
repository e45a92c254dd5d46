"""Find the annotations of an index's images: by name, with the sizes compared."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.annotations.coco import BadObject, CocoFile
from data_pipeline.arrays import Int64Array
from data_pipeline.errors import UsageError
from data_pipeline.index import Index

LISTED = 5  # contradictions named in a message
LABEL_SUFFIX = ".png"


@dataclass(frozen=True)
class Matched:
    """`rows` int64 [n]: of each of the index's images the row of its annotations, -1 without; and contradictions."""

    rows: Int64Array
    bad: list[BadObject]


def refuse_contradictions(bad: Sequence[BadObject], path: Path, *, images: int, limit: float, key: str) -> list[str]:
    """Return a line that names the first contradictions of annotations; none without any.

    Raises UsageError, with the same names, for more of them than a share `limit` (the setting `key`) of the images.
    """
    if not bad:
        return []
    named = "; ".join(f"{one.what}: {one.reason}" for one in bad[:LISTED])
    more = f"; and {len(bad) - LISTED:,} more" if len(bad) > LISTED else ""
    allowed = int(limit * images)
    if len(bad) > allowed:
        raise UsageError(
            f"{path} contradicts itself or the images {len(bad):,} times, allowed are {allowed:,} ({key}={limit:g} of "
            f"{images:,} images); mend it, or raise that limit: {named}{more}"
        )
    return [f"{len(bad):,} annotations of {path} are left out: {named}{more}"]


def match_objects(index: Index, found: CocoFile) -> Matched:
    """Return the rows of a COCO file's images that are the index's, and the file's contradictions with them and itself.

    An image of another size than the file says has none: its boxes are of another image. COCO's are of images as
    stored, and so the index is not to be turned by EXIF.
    """
    sizes = dict(zip(found.names, enumerate(zip(found.heights, found.widths, strict=True)), strict=True))
    rows, bad = np.full(len(index), -1, np.int64), list(found.bad)
    for image in range(len(index)):
        name = os.fsdecode(index.rows.name(image))
        row, size = sizes.get(name, (-1, None))
        stored = int(index.height[image]), int(index.width[image])
        if size is not None and size != stored:
            bad.append(BadObject(name, f"the image is {_px(stored)}, its annotations are of {_px(size)}"))
            continue
        rows[image] = row
    taken, times = np.unique(rows[rows >= 0], return_counts=True)
    if (times > 1).any():
        name = found.names[int(taken[times > 1][0])]
        raise UsageError(f"{index.root} holds more than one image {name}; expected each name once")
    return Matched(rows, bad)


def with_objects(found: CocoFile, rows: Int64Array) -> Int64Array:
    """Return which of the index's images have an object that is no crowd, int64: those that are trained on.

    `rows` as in Matched. COCO's images without any are left out in training, as detectron2 and torchvision do.
    """
    objects = found.objects
    single = np.concatenate([[0], np.cumsum(~objects.crowd)])
    count = single[objects.first[1:]] - single[objects.first[:-1]]
    there = np.flatnonzero(rows >= 0)
    return there[count[rows[there]] > 0]


def label_files(index: Index, folder: Path) -> list[Path]:
    """Return each image's label map: the file of its name in `folder`, with the ending .png.

    Raises UsageError naming those that are not there or of two images, or when the index is of shards.
    """
    if index.kind == "shards":
        raise UsageError(f"{index.root} holds shards; label maps are taken beside an image folder")
    files = [folder / Path(index.name(image)).with_suffix(LABEL_SUFFIX) for image in range(len(index))]
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        raise UsageError(f"{twice[0]} would be the label map of two images, which differ in their endings; rename one")
    have = set(_listed(folder))
    missing = [file for file in files if file not in have]
    if missing:
        named = ", ".join(str(file) for file in missing[:LISTED])
        raise UsageError(
            f"{len(missing)} of {len(files)} images have no label map ({named}{', ...' * (len(missing) > LISTED)}); "
            "expected a PNG for each image, of the same relative name"
        )
    return files


def _listed(folder: Path) -> Sequence[Path]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; give the folder of the label maps")
    return [Path(parent) / name for parent, _, names in os.walk(folder, followlinks=True) for name in names]


def _px(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]} px"
