"""List the contents of a data folder without opening files: images or shards, and which folders are classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

from data_pipeline.errors import UsageError
from data_pipeline.image_header.read import IMAGE_SUFFIXES

CHUNK_NAMES = 1000
BESIDE_SHARDS = frozenset((".json", ".idx", ".txt", ".md"))  # files that packers leave beside shards; not reported


@dataclass
class Listing:
    """The contents of a data folder by name: images in chunks, or shards.

    `left_out` counts the other files by suffix; `loops` has a line on links that are not followed.
    """

    root: Path
    classes: list[str]
    chunks: list[tuple[int, bytes]]  # (label, names joined by zero bytes)
    shards: list[str]
    left_out: dict[str, int] = field(default_factory=dict)
    loops: list[str] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        """Return the number of images in all chunks."""
        return sum(names.count(b"\0") + 1 for _, names in self.chunks)


def list_folder(root: Path) -> Listing:
    """List the images or tar shards under `root`, symbolic links followed, names that begin with a dot left
    out.

    Raises UsageError when it is missing, empty, cannot be listed, or holds images and shards together.
    """
    if not root.is_dir() and (problem := folder_problem(root)):
        raise UsageError(f"{problem}; give an image folder or a folder of .tar shards")
    shards: list[str] = []
    loops: list[bytes] = []
    others: Counter[str] = Counter()
    status = os.stat(root)
    above = frozenset({(status.st_dev, status.st_ino)})
    entries = _entries(os.fsencode(root))
    suffixes = tuple(os.fsencode(suffix) for suffix in IMAGE_SUFFIXES)

    def images() -> Iterator[bytes]:
        for name, is_folder in entries:
            for path in _walk(os.fsencode(root), name, above, loops) if is_folder else [name]:
                lower = path.lower()
                if lower.endswith(suffixes):
                    yield path
                elif lower.endswith(b".tar"):
                    shards.append(os.fsdecode(path))
                else:
                    others[os.path.splitext(os.fsdecode(lower))[1] or "without a suffix"] += 1

    # (folder, names of its images joined by zero bytes), in the order of the names
    found = [(folder, b"\0".join(names)) for folder, names in groupby(images(), key=os.path.dirname)]
    if shards and found:
        raise UsageError(f"{root} holds both images and tar shards (such as {shards[0]}); give a folder of one kind")
    if not shards and not found:
        skipped = others.total()
        found_instead = f", but {skipped} other file{'s' * (skipped != 1)}" if skipped else ""
        raise UsageError(
            f"no image in {root}{found_instead}; expected {', '.join(IMAGE_SUFFIXES)} files, flat or in a "
            "folder per class, or uncompressed .tar shards in WebDataset layout"
        )
    classes, labels = _classes([name for name, is_folder in entries if is_folder], {folder for folder, _ in found})
    chunks: list[tuple[int, bytes]] = []
    for label, folders in groupby(found, key=lambda part: labels[part[0]]):
        names = (name for _, joined in folders for name in joined.split(b"\0"))
        while some := list(islice(names, CHUNK_NAMES)):
            chunks.append((label, b"\0".join(some)))
    if shards:
        others = Counter({suffix: count for suffix, count in others.items() if suffix not in BESIDE_SHARDS})
    classes, left_out = classes if found else [], dict(others)
    return Listing(root, classes, chunks, shards, left_out=left_out, loops=_not_followed(loops))


def folder_problem(root: Path) -> str | None:
    """Return the problem with a data folder as a whole, such as a disk that is not mounted; None when there is none."""
    try:
        with os.scandir(root) as entries:
            return None if any(entries) else f"the data folder {root} holds nothing"
    except FileNotFoundError:
        return f"the data folder {root} does not exist"
    except NotADirectoryError:
        return f"{root} is not a folder"
    except OSError as error:
        return f"the data folder {root} cannot be read ({error.strerror})"


def _not_followed(loops: list[bytes]) -> list[str]:
    if not loops:
        return []
    return [f"links to a folder above themselves, not followed: {len(loops):,} ({os.fsdecode(loops[0])})"]


def _classes(top: list[bytes], holders: set[bytes]) -> tuple[list[str], dict[bytes, int]]:
    """Return the classes by name, and the label of each folder that holds images (-1 for the root, b"").

    The classes are the folders `top` in the root, whatever lies below them, such as a single folder "images" in
    Tiny-ImageNet. Where none of them holds images but some hold several folders of them, as iNaturalist (Aves/3100)
    and Places (a/abbey) are published, the classes are the uppermost folders that hold images.
    """
    inside = {folder for folder in holders if folder}
    second = {tuple(folder.split(b"/")[:2]) for folder in inside}
    nested = inside.isdisjoint(top) and len(second) > len({first for first, *_ in second})
    names = sorted(os.fsdecode(folder) for folder in (_uppermost(inside) if nested else top))
    number = {os.fsencode(name): label for label, name in enumerate(names)}
    return names, {folder: next((number[up] for up in _from_top(folder) if up in number), -1) for folder in holders}


def _uppermost(folders: set[bytes]) -> set[bytes]:
    """Return the folders that have none of the others above them."""
    return {next(up for up in _from_top(folder) if up in folders) for folder in folders}


def _from_top(folder: bytes) -> Iterator[bytes]:
    """Return b"a", b"a/b" and b"a/b/c" of b"a/b/c"."""
    parts = folder.split(b"/")
    return (b"/".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def _entries(folder: bytes) -> list[tuple[bytes, bool]]:
    """Return (name, is a folder) of a folder's entries, in the order that their full paths have as bytes."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith(b".")]
    except OSError as error:
        raise UsageError(
            f"cannot list {os.fsdecode(folder)}: {error.strerror}; the whole data folder must be readable"
        ) from None
    return sorted(found, key=lambda entry: entry[0] + b"/" if entry[1] else entry[0])


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: it will be a file that cannot be read
        return False


def _walk(root: bytes, folder: bytes, above: frozenset[tuple[int, int]], loops: list[bytes]) -> Iterator[bytes]:
    """Yield the relative paths of all files below root/folder; note links to a folder above themselves in `loops`."""
    status = os.stat(os.path.join(root, folder))
    if (status.st_dev, status.st_ino) in above:
        loops.append(folder)
        return
    for name, is_folder in _entries(os.path.join(root, folder)):
        path = folder + b"/" + name
        if is_folder:
            yield from _walk(root, path, above | {(status.st_dev, status.st_ino)}, loops)
        else:
            yield path
