"""The label maps that a segmenter learns from, and is measured on: files beside the images, and the classes' names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from data_pipeline.annotations.label_maps import read_class_names, read_label_map
from data_pipeline.annotations.matching import label_files
from data_pipeline.arrays import Uint8Array
from data_pipeline.errors import UsageError
from data_pipeline.files import write_json
from data_pipeline.index import Index
from mae_scale.config.schema import Recipe
from mae_scale.tasks.dense_transfer import annotations_path
from mae_scale.training.inputs import has_step, recorded

CLASSES = "classes.json"
"""The names of a run's classes, in its folder."""
NEEDED = {
    "labels": "/path/to/annotations/training (a PNG of the same name for each image of data.root)",
    "val_labels": "/path/to/annotations/validation (a PNG of the same name for each image of data.val_root)",
    "class_names": "FILE (a class's name on each line, or ADE20K's objectInfo150.txt)",
}
"""The keys that name them, and what each is to name."""
LABELS = "labels"
"""The fact of a checkpoint's manifest about the label maps: their digest."""


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

    def digest(self) -> str:
        """Return a digest of the files' names and sizes: it changes with most of them, and reads none."""
        told = "".join(f"{file.name} {file.stat().st_size}\n" for file in self._files)
        return hashlib.sha256(told.encode()).hexdigest()

    def refuse_others(self, recipe: Recipe, out: Path) -> None:
        """Raise UsageError when the run in `out` was begun with other label maps, as far as names and sizes tell."""
        known = recorded(out, LABELS)
        if known is not None and known != self.digest():
            raise UsageError(
                f"segmentation.labels={recipe.segmenting.labels} holds other label maps than the run in {out} was "
                "begun with (at least one is of another size); give those, wherever they lie, or choose another --out"
            )


def class_names(recipe: Recipe, out: Path) -> list[str]:
    """Return the names of the classes: of a run in `out` those that it was begun with, else the recipe's.

    Raises UsageError when the recipe's are others than the run's.
    """
    kept = out / CLASSES
    known: list[str] | None = json.loads(kept.read_text(encoding="utf-8")) if has_step(out) and kept.exists() else None
    path = recipe.segmenting.class_names
    if known is not None and (path is None or not path.exists()):
        return known
    found = read_class_names(annotations_path(recipe, "class_names", NEEDED))
    if known is not None and found != known:
        raise UsageError(
            f"segmentation.class_names={path} are other classes than the run in {out} was begun with; give those, "
            "drop the key, or choose another --out"
        )
    return found


def keep_class_names(names: list[str], out: Path) -> None:
    """Write the names into a run's folder."""
    write_json(out / CLASSES, names)
