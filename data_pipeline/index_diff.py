"""Find the images in which the indexes of two folders differ; locations and file times do not count."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipeline.index import Index


def differing_images(kept: Index, found: Index, *, part: bool) -> list[str]:
    """Return the names of the images in one index that are missing or different in the other.

    Compared are name, number of bytes, height, width, offset in the shard and name of the class. Files that either
    index could not read do not count: such an image is replaced during training. With `part`, `kept` holds only a part
    of its folder, and other images in `found` do not count.
    """
    if kept.digest() == found.digest():
        return []
    unreadable = {name for name, _ in (*kept.unreadable, *found.unreadable)}
    before, now = (np.fromiter((hash(image) for image in _images(index)), np.int64) for index in (kept, found))
    rows = [(kept, row) for row in np.flatnonzero(~np.isin(before, now))]
    if not part:
        rows += [(found, row) for row in np.flatnonzero(~np.isin(now, before))]
    return sorted({index.name(int(row)) for index, row in rows} - unreadable)


def _images(index: Index) -> Iterator[tuple[str | int, ...]]:
    """Yield what identifies each image, independent of the folder's location."""
    columns = (index.num_bytes, index.height, index.width, index.offset, index.label)
    for row, (*sizes, label) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        yield index.name(row), *sizes, index.classes[label] if label >= 0 and index.classes else label
