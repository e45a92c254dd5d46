"""The words of a folder's images, written once by `mae-scale tokens`: what the folder holds, and how it is read.

    DIR/words_00000.npy  [n, L] uint16 (int32 for more than 65,536 words): the images of a shard in the index's order
    DIR/manifest.json    written last: the keys of Heading, and "shards", a list with those of Shard

Until then unfinished.json holds the heading, and words_00000.json, beside each shard that is whole, its record.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UsageError
from data_pipeline.index import Index

MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
FORMAT = 1
AGAIN = "the same `mae-scale tokens` again"


@dataclass(frozen=True)
class Heading:
    """All that decides the words of a folder."""

    index: str
    """Digest of the images' index."""
    images: int
    tokeniser: str
    """Digest of the tokeniser's weights (models.weights.tokeniser)."""
    words: int
    grid: int
    """Words per side of an image."""
    image_size: int
    """Side in pixels of the image, cut as in evaluation, of which the tokeniser takes a view of 8 x grid."""
    exif_orientation: bool
    shard_images: int
    format: int = FORMAT

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of the words in the files."""
        return np.dtype(np.uint16 if self.words <= 2**16 else np.int32)

    @property
    def shards(self) -> list[range]:
        """Return the rows of the index that each shard has."""
        starts = range(0, self.images, self.shard_images)
        return [range(start, min(start + self.shard_images, self.images)) for start in starts]


@dataclass(frozen=True)
class Shard:
    """The record of a file of words."""

    name: str
    images: int
    sha256: str
    unreadable: list[int]
    """Rows of the index whose images could not be read, and so have no words."""


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"words_{number:05d}.npy"


def read_heading(path: Path) -> tuple[Heading, list[Shard]] | None:
    """Return the heading and the shards' records in a manifest.json or unfinished.json; None without the file.

    Raises UsageError when it is damaged or of another version.
    """
    try:
        found = json.loads(path.read_bytes())
        shards = [Shard(**record) for record in found.pop("shards", [])]
        if found["format"] != FORMAT:
            raise UsageError(f"{path} is of format {found['format']}, expected {FORMAT}; write the words again")
        return Heading(**found), shards
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is damaged; remove {path.parent} and run {AGAIN}") from None


def read_manifest(folder: Path) -> tuple[Heading, list[Shard]]:
    """Return the heading and the shards' records of a finished folder. Raises UsageError when it is none."""
    found = read_heading(folder / MANIFEST)
    if found is not None:
        return found
    if (folder / UNFINISHED).exists():
        raise UsageError(f"the words in {folder} are not complete; run {AGAIN} to finish them")
    raise UsageError(f"{folder} has no {MANIFEST}; give a folder that `mae-scale tokens --out` has written")


def verify_tokens(folder: Path) -> tuple[Heading, list[tuple[str, str]]]:
    """Return the heading, and (shard, reason) of each shard that is missing or has changed since it was written.

    Raises UsageError when the folder is none of finished words.
    """
    heading, shards = read_manifest(folder)
    return heading, [(shard.name, reason) for shard in shards if (reason := damage(folder, shard))]


def damage(folder: Path, shard: Shard) -> str:
    """Return the damage of a shard with that record, "" when it is whole."""
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    try:
        with open(folder / shard.name, "rb") as file:
            while some := file.read(2**20):
                digest.update(some)
    except OSError as error:
        return error.strerror or str(error)
    return "" if digest.hexdigest() == shard.sha256 else "its bytes have changed since it was written (sha256)"


class StoredTokens:
    """The words of an index's images, on the disk."""

    def __init__(self, folder: Path, heading: Heading, shards: list[Shard]):
        """Map the shards. Raises UsageError when one is missing or of another shape."""
        self._folder, self.heading = folder, heading
        self._shards: list[np.ndarray] = []
        for rows, shard in zip(heading.shards, shards, strict=True):
            try:
                words = np.load(folder / shard.name, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UsageError(f"{folder / shard.name} cannot be read ({reason}); run {AGAIN}") from None
            expected = (len(rows), heading.grid**2)
            if words.shape != expected or words.dtype != heading.dtype:
                raise UsageError(
                    f"{folder / shard.name} holds {words.dtype} {words.shape}, expected {heading.dtype} {expected}; "
                    f"run {AGAIN}"
                )
            self._shards.append(words)
        self._unreadable = {row for shard in shards for row in shard.unreadable}

    def rows(self, sample_ids: np.ndarray) -> np.ndarray:
        """Return the words int64 [n, L] of images, by their rows int [n] in the index.

        Raises UsageError for an image that could not be read when the words were written, and so has none, and for
        words that the tokeniser does not have.
        """
        found = np.empty((len(sample_ids), self.heading.grid**2), np.int64)
        for place, row in enumerate(map(int, sample_ids)):
            if row in self._unreadable:
                raise UsageError(
                    f"image {row} of the index has no words in {self._folder}, for it could not be read when they were "
                    f"written; run {AGAIN}, now that it can be"
                )
            shard, inside = divmod(row, self.heading.shard_images)
            found[place] = self._shards[shard][inside]
        if found.max(initial=0) >= self.heading.words:
            raise UsageError(
                f"{self._folder} holds word {found.max()}, expected 0 to {self.heading.words - 1}: a file is damaged "
                f"(`mae-scale tokens --verify {self._folder}` says which); run {AGAIN}"
            )
        return found


def open_tokens(
    folder: Path, index: Index, tokeniser: str, grid: int, *, image_size: int, exif_orientation: bool = False
) -> StoredTokens:
    """Return the words in a folder of `mae-scale tokens`, checked to be those of these images by this tokeniser.

    tokeniser: its digest (models.weights.tokeniser.tokeniser_digest); grid: words per side; image_size and
    exif_orientation as in the recipe that is trained. Raises UsageError for each difference, and for a damaged folder;
    the shards' bytes are compared with their digests by verify_tokens() only.
    """
    heading, shards = read_manifest(folder)
    asked = {
        "images": (
            index.digest()[:12],
            heading.index[:12],
            "data.root, data.fraction or the order of the images differ",
        ),
        "tokeniser": (tokeniser[:12], heading.tokeniser[:12], "tokeniser.weights differ"),
        "words per side": (grid, heading.grid, "model.image_size or model.patch_size differ"),
        "pixels per side": (image_size, heading.image_size, "model.image_size differs"),
        "EXIF orientation": (exif_orientation, heading.exif_orientation, "data.exif_orientation differs"),
    }
    for what, (expected, found, cause) in asked.items():
        if expected != found:
            raise UsageError(
                f"tokeniser.tokens={folder} holds the words of other inputs: {what} {found}, expected {expected} "
                f"({cause}); write them for this recipe with `mae-scale tokens`, or drop tokeniser.tokens"
            )
    if len(shards) != len(heading.shards):
        raise UsageError(f"{folder / MANIFEST} names {len(shards)} of {len(heading.shards)} shards; run {AGAIN}")
    return StoredTokens(folder, heading, shards)
