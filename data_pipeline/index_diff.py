"""Find the images in which two indexes, of two folders, differ; the folders' places and files' times do not count."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipeline.index import Index


def differing_images(kept: Index, found: Index, *, part: bool) -> list[str]:
    """Return the names of images that are in one index and not, the same, in the other.

    The same: name, bytes, height, width, place in its shard, and name of its class. Files that one of them could not
    read are no difference: such an image is replaced when its turn comes. With `part`, `kept` holds a part of its
    folder, and what `found` has beside it does not count.
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
    """Yield what each image is, wherever its folder lies."""
    columns = (index.num_bytes, index.height, index.width, index.offset, index.label)
    for row, (*sizes, label) in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        yield index.name(row), *sizes, index.classes[label] if label >= 0 and index.classes else label
