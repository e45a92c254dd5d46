"""The objects of an index's images, and the file they are kept in: read from COCO's JSON once, then as columns."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.annotations.coco import CocoFile
from data_pipeline.annotations.objects import Objects
from data_pipeline.arrays import Int64Array
from data_pipeline.errors import UsageError
from data_pipeline.files import whole_file

FORMAT = 1


class DamagedAnnotations(UsageError):
    """A file of annotations that is damaged or of another format."""


@dataclass(frozen=True)
class AnnotatedImages:
    """The objects of n images, in the images' order; their ids in COCO's JSON, int64 [n], -1 for an image without one;
    the categories' ids, int64 [C], and names; the digest of the JSON."""

    objects: Objects
    image_ids: Int64Array
    category_ids: Int64Array
    categories: list[str]
    source: str

    @classmethod
    def of(cls, found: CocoFile, rows: Int64Array, source: str) -> AnnotatedImages:
        """Return those of images, whose `rows` in the file are as in Matched."""
        ids = np.append(np.array(found.image_ids, np.int64), -1)  # the last is that of the row -1
        return cls(
            found.objects.take(rows), ids[rows], np.array(found.category_ids, np.int64), found.categories, source
        )

    def digest(self) -> str:
        """Return a digest of all that is learnt from."""
        digest = hashlib.sha256()
        for name, column in self._columns().items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        with whole_file(path) as file:
            np.savez(file, format=np.array(FORMAT), source=np.array(self.source), **self._columns())  # type: ignore[arg-type]

    def _columns(self) -> dict[str, np.ndarray]:
        names = np.frombuffer("\n".join(self.categories).encode(), np.uint8)
        own: dict[str, np.ndarray] = {
            "image_ids": self.image_ids,
            "category_ids": self.category_ids,
            "categories": names,
        }
        return own | {field.name: getattr(self.objects, field.name) for field in dataclasses.fields(Objects)}


def load_annotated(path: Path) -> AnnotatedImages:
    """Return what `AnnotatedImages.save` has written. Raises DamagedAnnotations."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if int(file["format"]) != FORMAT:
                raise DamagedAnnotations(f"{path} is of another format of annotations; remove it")
            columns = {name: file[name] for name in file.files}
        objects = Objects(**{field.name: columns[field.name] for field in dataclasses.fields(Objects)})
        names = columns["categories"].tobytes().decode().split("\n")
        return AnnotatedImages(objects, columns["image_ids"], columns["category_ids"], names, str(columns["source"]))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedAnnotations(f"{path} is no whole file of annotations ({error}); remove it") from None
