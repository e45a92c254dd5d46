"""The label maps that a segmenter learns from, and is measured on: files beside the images, and the classes' names."""

from __future__ import annotations

import json
from pathlib import Path

from data_pipeline.annotations.label_maps import read_class_names, read_label_map
from data_pipeline.annotations.matching import label_files
from data_pipeline.arrays import Uint8Array
from data_pipeline.errors import UsageError
from data_pipeline.files import write_json
from data_pipeline.index import Index
from mae_scale.config.required import required
from mae_scale.config.schema import Recipe
from mae_scale.training.inputs import has_step

CLASSES = "classes.json"
"""The names of a run's classes, in its folder."""


class LabelFiles:
    """The label maps of an index's images, in a folder."""

    def __init__(self, index: Index, folder: Path, *, classes: int):
        """Find the files. Raises UsageError naming images without one."""
        self._index, self._classes = index, classes
        self._files = label_files(index, folder)

    def read(self, image: int) -> Uint8Array:
        """Return the labels uint8 [H, W] of a stored image, IGNORED where it has none. Raises BadImage."""
        size = {"height": int(self._index.height[image]), "width": int(self._index.width[image])}
        return read_label_map(self._files[image], **size, classes=self._classes)


def class_names(recipe: Recipe, out: Path) -> list[str]:
    """Return the names of the classes: of a run in `out` those that it was begun with, else the recipe's.

    Raises UsageError when the recipe's are others than the run's.
    """
    kept = out / CLASSES
    known: list[str] | None = json.loads(kept.read_text(encoding="utf-8")) if has_step(out) and kept.exists() else None
    path = recipe.segmenting.class_names
    if known is not None and (path is None or not path.exists()):
        return known
    advice = "add segmentation.class_names=FILE (a class's name on each line, or ADE20K's objectInfo150.txt)"
    found = read_class_names(required(path, "segmentation.class_names", advice))
    if known is not None and found != known:
        raise UsageError(
            f"segmentation.class_names={path} are other classes than the run in {out} was begun with; give those, "
            "drop the key, or choose another --out"
        )
    return found


def keep_class_names(names: list[str], out: Path) -> None:
    """Write the names into a run's folder."""
    write_json(out / CLASSES, names)
