"""The images and objects that a detector is measured on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.annotations.coco import BadObject, read_coco
from data_pipeline.annotations.matching import match_objects, refuse_contradictions
from data_pipeline.errors import UsageError
from data_pipeline.index import Index
from mae_scale.tasks.detection.annotations import LIMIT

log = logging.getLogger("mae_scale")


@dataclass(frozen=True)
class DetectionSet:
    """Images that a COCO JSON names, their ids in it, the categories' ids and names, and the places in its
    "annotations" that are left out."""

    index: Index
    image_ids: list[int]
    category_ids: list[int]
    categories: list[str]
    annotations: Path
    left_out: list[int]


def detection_set(index: Index, annotations: Path, *, categories: list[str] | None, limit: float) -> DetectionSet:
    """Return the set of a folder's images and a file. categories: those that the detector knows, where that is known.

    Raises UsageError for more contradictions than the limit, images of the file that are not there among them, and for
    other categories than the detector's.
    """
    found = read_coco(annotations)
    if categories is not None and found.categories != categories:
        raise UsageError(
            f"{annotations} has {len(found.categories)} categories ({_some(found.categories)}), the detector "
            f"{len(categories)} ({_some(categories)}); give annotations of the same categories"
        )
    matched = match_objects(index, found)
    there = np.flatnonzero(matched.rows >= 0)
    if not len(there):
        raise UsageError(
            f"none of the {len(index):,} images of {index.root} is named in {annotations}, whose names are such as "
            f"{found.names[0] if found.names else '-'}; expected names relative to data.val_root"
        )
    in_folder = {index.name(image) for image in range(len(index))}
    absent = [name for name in found.names if name not in in_folder]
    missing = [BadObject(name, f"there is no such image in {index.root}") for name in absent]
    bad = [*matched.bad, *missing]
    for line in refuse_contradictions(bad, annotations, images=len(index), limit=limit, key=LIMIT):
        log.warning(line)
    ids = [found.image_ids[row] for row in matched.rows[there]]
    return DetectionSet(
        index.take(there), ids, found.category_ids, found.categories, annotations, left_out=found.left_out
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
