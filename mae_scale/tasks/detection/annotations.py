"""The objects that a run learns from: read from COCO's JSON at its first start, and kept in its folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from data_pipeline.annotations.annotated import AnnotatedImages, DamagedAnnotations, load_annotated
from data_pipeline.annotations.coco import CocoFile
from data_pipeline.annotations.matching import match_objects, refuse_contradictions, with_objects
from data_pipeline.errors import UsageError
from data_pipeline.index import Index
from mae_scale.checkpoints.shards import digest_of
from mae_scale.config.schema import Recipe
from mae_scale.training.inputs import has_step, recorded

OBJECTS = "objects.npz"
DIGEST = "annotations"
"""The fact of a checkpoint's manifest about them: their digest."""
NEEDED = {
    "annotations": "/path/to/instances_train2017.json (COCO's JSON of data.root's objects)",
    "val_annotations": "/path/to/instances_val2017.json (COCO's JSON of data.val_root's objects)",
}
"""The keys that name them, and what each is to name."""
LIMIT = "detection.bad_annotation_limit"

log = logging.getLogger("mae_scale")


class TrainingObjects:
    """The objects of a run's training images; `read` gives COCO's JSON at `path`, where the recipe names one."""

    def __init__(self, recipe: Recipe, out: Path, path: Path | None, read: Callable[[], CocoFile]):
        self._recipe, self._file, self._path, self._read_file = recipe, out / OBJECTS, path, read
        self._loaded: AnnotatedImages | None = None

    @cached_property
    def _found(self) -> CocoFile:
        return self._read_file()

    def choose(self, images: Index) -> Index:
        """Return the images that have an object that is no crowd.

        Raises UsageError when there is none, or for more contradictory annotations than detection.bad_annotation_limit.
        """
        section, matched = self._recipe.detecting, match_objects(images, self._found)
        assert section.annotations is not None  # _found
        for line in refuse_contradictions(
            matched.bad, section.annotations, images=len(images), limit=section.bad_annotation_limit, key=LIMIT
        ):
            log.warning(line)
        chosen = with_objects(self._found, matched.rows)
        if not len(chosen):
            raise UsageError(
                f"none of the {len(images):,} images of {images.root} has objects in "
                f"{self._recipe.detecting.annotations}, which names {len(self._found.names):,} images such as "
                f"{self._found.names[0] if self._found.names else '-'}; expected names relative to data.root"
            )
        return images.take(chosen)

    @cached_property
    def categories(self) -> list[str]:
        """The categories' names: of those that are kept, else of the JSON."""
        kept = self._loaded or self._kept
        return self._found.categories if kept is None else kept.categories

    @cached_property
    def _kept(self) -> AnnotatedImages | None:
        """What the run's folder holds since its first step; None before, or where it is lost."""
        if not (has_step(self._file.parent) and self._file.exists()):
            return None
        try:
            return load_annotated(self._file)
        except DamagedAnnotations as error:
            log.warning("%s; it is written again", error)
            return None

    def check(self, images: Index) -> None:
        """Raise UsageError for another file than the run was begun with, and for other objects where they are lost."""
        if self._kept is None:
            self._read(images)
        elif self._path is not None and self._path.is_file() and digest_of(self._path) != self._kept.source:
            raise UsageError(
                f"detection.annotations={self._path} is another file than the run in {self._file.parent} was begun "
                f"with; give that one, drop the key ({self._file.name} there holds the objects), or choose another "
                "--out"
            )

    def keep(self, images: Index) -> None:
        """Write the objects of the training images into the run's folder, unless they are there."""
        if self._kept is None:
            self._read(images).save(self._file)

    def load(self) -> AnnotatedImages:
        """Return the objects that `keep` has written."""
        self._loaded = self._loaded or load_annotated(self._file)
        return self._loaded

    def _read(self, images: Index) -> AnnotatedImages:
        coco = self._found  # refuses a recipe that names no file
        assert self._path is not None
        found = AnnotatedImages.of(coco, match_objects(images, coco).rows, digest_of(self._path))
        known = recorded(self._file.parent, DIGEST)
        if known is not None and found.digest() != known:
            raise UsageError(
                f"detection.annotations={self._recipe.detecting.annotations} holds other objects than the run in "
                f"{self._file.parent} was begun with (digest {found.digest()[:12]}, expected {known[:12]}), and "
                f"{self._file.name} there, which keeps them, is lost or damaged; give the file of the first start, or "
                "choose another --out"
            )
        return found
