"""The index of a data folder: what images there are, where their bytes lie, their sizes, which are
unreadable.

Columns of NumPy arrays, about 100 bytes an image, so that 15 million images fit; kept in one file (NumPy's
npz) beside the data or elsewhere. Images are in the order of their relative paths as bytes, so that the same
folder gives the same index on every machine and with any number of processes. Heights and widths are those of
the stored pixels: EXIF orientation is ignored here and in decoding alike, as the paper's code does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from bisect import bisect_left
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.listing import CHUNK_NAMES, Listing, list_folder
from data_pipeline.order import generator
from data_pipeline.pack_manifest import packed_classes
from data_pipeline.scanning import (
    COLUMNS,
    ONE_PROCESS_IMAGES,
    ONE_PROCESS_SHARDS,
    Bad,
    Progress,
    Rows,
    check_images,
    run_tasks,
    scan_names,
    scan_shard,
)
from data_pipeline.whole_file import whole_file
from mae_scale.errors import UsageError

INDEX_NAME = ".mae_scale_index.npz"
FORMAT = 1
SAMPLED_NAMES = 64

log = logging.getLogger("mae_scale.data")


class Index:
    """The readable images of a data folder, as columns; image i is row i.

    `label` int32 [n] (-1: none), `height` and `width` int32 [n] (pixels as stored), `num_bytes`, `mtime_ns`
    and `offset` int64 [n] (offset into the shard, 0 for a file), `shard` int32 [n] (-1 for a file); `classes`
    the class names by label; `shard_names` and `shard_bytes`; `bad` the unreadable files, which have no row.
    """

    def __init__(
        self, root: Path, rows: Rows, classes: list[str], shard_names: list[str], shard_bytes: list[int]
    ) -> None:
        self.root = Path(root)
        self.rows = rows
        self.classes = classes
        self.shard_names = shard_names
        self.shard_bytes = shard_bytes
        self.label, self.height, self.width = (rows.columns[name] for name in ("label", "height", "width"))
        self.num_bytes, self.mtime_ns = rows.columns["num_bytes"], rows.columns["mtime_ns"]
        self.offset, self.shard = rows.columns["offset"], rows.columns["shard"]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Index({str(self.root)!r}, {self.summary()})"

    @property
    def kind(self) -> str:
        """ "folder" or "shards"."""
        return "shards" if self.shard_names else "folder"

    @property
    def bad(self) -> list[Bad]:
        return self.rows.bad

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """(name, reason) of the files that were left out."""
        return [(bad.name, bad.reason) for bad in self.bad]

    def name(self, image: int) -> str:
        """Path relative to the folder, or shard/member."""
        return self.rows.shard_name(self.shard_names, int(image))

    def path(self, image: int) -> Path:
        """The file that holds image `image`: itself, or its shard."""
        shard = int(self.shard[image])
        inside = os.fsdecode(self.rows.name(int(image))) if shard < 0 else self.shard_names[shard]
        return self.root / inside

    def take(self, images: np.ndarray) -> Index:
        """An index of these images, int [n], in this order."""
        return Index(self.root, self.rows.take(images), self.classes, self.shard_names, self.shard_bytes)

    def few(self, count: int, *, seed: int) -> Index:
        """An index of `count` images of each class, drawn by the seed, in the order of this one.

        Raises UsageError when a class has fewer.
        """
        chosen = []
        for label in np.unique(self.label):
            images = np.flatnonzero(self.label == label)
            if len(images) < count:
                name = self.classes[label] if self.classes else str(label)
                raise UsageError(
                    f"data.labels_a_class={count}: class {name} has {len(images)} images; choose at most that many"
                )
            draws = generator(seed, "few", int(label)).bit_generator.random_raw(len(images))
            chosen.append(images[np.argsort(draws, kind="stable")[:count]])
        return self.take(np.sort(np.concatenate(chosen)))

    def summary(self) -> str:
        """One line for people."""
        mib = self.num_bytes.sum() / 2**20
        parts = [f"{len(self):,} images", f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.2f} MiB"]
        if self.classes:
            nested = next((f" such as {name}" for name in self.classes if "/" in name), "")
            parts.append(f"{len(self.classes)} classes{nested}")
        if self.shard_names:
            parts.append(f"{len(self.shard_names)} shards")
        if self.bad:
            parts.append(f"{len(self.bad):,} unreadable files left out")
        return ", ".join(parts)

    def digest(self) -> str:
        """32 hex digits that change with any image, its order, size or label; not with times or the root."""
        state = hashlib.blake2b(digest_size=16)
        state.update(json.dumps([self.classes, self.shard_names]).encode())
        for column in (self.rows.names, self.rows.ends):
            state.update(np.ascontiguousarray(column))
        for name in COLUMNS:
            if name != "mtime_ns":
                state.update(np.ascontiguousarray(self.rows.columns[name]))
        return state.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to `path`: whole, or not at all. Raises OSError."""
        path = Path(path)
        about = {
            "format": FORMAT,
            "root": str(self.root),
            "classes": self.classes,
            "shard_names": self.shard_names,
            "shard_bytes": self.shard_bytes,
            "bad": [[bad.name, bad.reason, bad.num_bytes, bad.mtime_ns] for bad in self.bad],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            np.savez(
                file,
                about=np.frombuffer(json.dumps(about).encode(), np.uint8),
                names=self.rows.names,
                ends=self.rows.ends,
                **self.rows.columns,
            )


def load_index(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Index:
    """Read an index file; `root` is where the data lie now (default: where they lay when it was written).

    Raises UsageError when there is no such file or it is no whole index.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            if about["format"] != FORMAT:
                raise UsageError(
                    f"index {path} is of format {about['format']}, not {FORMAT}; delete it to build it again"
                )
            columns = {name: file[name].astype(dtype, copy=False) for name, dtype in COLUMNS.items()}
            rows = Rows(file["names"], file["ends"], columns, [Bad(*bad) for bad in about["bad"]])
    except FileNotFoundError:
        raise UsageError(f"no index at {path}; write it with `mae-scale data index`") from None
    except OSError as error:
        raise UsageError(f"index {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        raise UsageError(f"{path} is damaged, or no index at all; delete it, it is built again") from None
    return Index(Path(root or about["root"]), rows, about["classes"], about["shard_names"], about["shard_bytes"])


def build_index(root: str | os.PathLike[str], *, workers: int | None = None, progress: Progress = True) -> Index:
    """Index every image under `root` (an image folder, flat or with a folder a class, or tar shards).

    Where the first level holds only folders of folders, as in iNaturalist and Places, these inner ones are classes.

    `workers` processes read the headers (default: one a core); `progress` shows a bar, or is called with
    (done, total). Raises UsageError when the folder is missing, empty or cannot be listed, or no image is
    readable.
    """
    return _scan(Path(root), None, workers, progress)


def open_index(
    root: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    refresh: bool = True,
    workers: int | None = None,
    progress: Progress = True,
    keep: bool = True,
) -> Index:
    """The index of `root`, from `path` (default: root/.mae_scale_index.npz), built and written when absent.

    With `refresh`, files that are new or changed (by size and modification time) are read again and files
    that are gone are dropped. A run that resumes uses `refresh=False`, so that its order stays what it was.
    Without `keep` nothing is written.
    Raises UsageError when the index is of other data, a shard has shrunk, or `path` cannot be written.
    """
    root = Path(root)
    file = Path(path) if path else root / INDEX_NAME
    if not os.path.exists(file):
        index = build_index(root, workers=workers, progress=progress)
        if keep:
            _write(index, file, given=path is not None)
        return index
    index = load_index(file, root)
    if not refresh:
        if not index.root.is_dir():
            raise UsageError(f"the data folder {index.root} does not exist; give an image folder or tar shards")
        if not most_are_there(index):
            raise _other_data(index, file)
        check_shards(index)
        return index
    fresh = _scan(root, index, workers, progress, file)
    if keep and (fresh.rows.read or fresh.digest() != index.digest() or fresh.unreadable != index.unreadable):
        _write(fresh, file, given=path is not None)
    return fresh


def verify(
    index: Index, deep: bool = False, *, workers: int | None = None, progress: Progress = True
) -> list[tuple[str, str]]:
    """(name, reason) of every indexed image that is no longer as indexed: its bytes, size, start and end
    markers.

    `deep` decodes each image as well, which also finds damage in the middle that a decoder refuses.
    """
    bounds = [*range(0, len(index), CHUNK_NAMES), len(index)]
    tasks = [
        (str(index.root), index.shard_names, index.rows.slice(first, last), deep) for first, last in pairwise(bounds)
    ]
    counts = [len(rows) for _, _, rows, _ in tasks]
    if workers is None and len(index) <= (ONE_PROCESS_IMAGES // 20 if deep else ONE_PROCESS_IMAGES):
        workers = 1
    parts = run_tasks("verifying images", check_images, tasks, counts, workers, progress)
    return [found for part in parts for found in part]


def check_shards(index: Index) -> None:
    """Raise UsageError when a shard is missing or smaller than when it was indexed."""
    for name, expected in zip(index.shard_names, index.shard_bytes, strict=True):
        try:
            found = os.stat(index.root / name).st_size
        except OSError as error:
            raise UsageError(
                f"shard {index.root / name}: {error.strerror}; restore it or index the folder again"
            ) from None
        if found < expected:
            raise UsageError(
                f"shard {index.root / name} has shrunk: {found:,} bytes, {expected:,} when it was indexed; "
                "copy it again, or delete the index if this is meant"
            )


def _write(index: Index, file: Path, given: bool) -> None:
    try:
        index.save(file)
    except OSError as error:
        if given:
            raise UsageError(f"cannot write the index {file}: {error.strerror or error}") from None
        log.warning("the index is not kept: %s (%s); give data.index a path that can be written", file, error.strerror)


def _scan(root: Path, known: Index | None, workers: int | None, progress: Progress, file: Path | None = None) -> Index:
    listing = list_folder(root)
    if known is not None and (known.kind == "shards") != bool(listing.shards):
        raise _other_data(known, file)
    if listing.shards:
        index = _scan_shards(listing, known, workers, progress, file)
    else:
        index = _scan_images(listing, known, workers, progress, file)
    if not len(index):
        shown = "; ".join(f"{name}: {reason}" for name, reason in index.unreadable[:5])
        raise UsageError(f"no readable image in {root}: {len(index.bad):,} files are bad ({shown})")
    if index.rows.read and index.bad:
        name, reason = index.unreadable[0]
        log.warning("%s: %d unreadable files are left out, such as %s (%s)", root, len(index.bad), name, reason)
    return index


def _scan_images(
    listing: Listing, known: Index | None, workers: int | None, progress: Progress, file: Path | None
) -> Index:
    tasks: list[tuple[Any, ...]] = []
    bad_before = sorted(known.bad, key=lambda bad: os.fsencode(bad.name)) if known else []
    for label, names in listing.chunks:
        rows, bad = None, []
        if known:
            first, last = names.split(b"\0", 1)[0], names.rsplit(b"\0", 1)[-1]
            rows = known.rows.slice(*_range(len(known), known.rows.name, first, last))
            low, high = _range(len(bad_before), lambda k: os.fsencode(bad_before[k].name), first, last)
            bad = bad_before[low:high]
        tasks.append((str(listing.root), label, names, rows, bad))
    counts = [names.count(b"\0") + 1 for _, names in listing.chunks]
    if workers is None and sum(counts) <= ONE_PROCESS_IMAGES:
        workers = 1
    parts = run_tasks("indexing images", scan_names, tasks, counts, workers, progress)
    fresh = Index(listing.root, Rows.joined(parts), listing.classes, [], [])
    if known and 2 * fresh.rows.same < len(known):
        raise _other_data(known, file)
    return fresh


def _range(count: int, name: Callable[[int], bytes], first: bytes, last: bytes) -> tuple[int, int]:
    """Rows whose sorted names lie from `first` to `last`."""
    rows = range(count)
    return bisect_left(rows, first, key=name), bisect_left(rows, last + b"\0", key=name)


def _scan_shards(
    listing: Listing, known: Index | None, workers: int | None, progress: Progress, file: Path | None
) -> Index:
    classes = packed_classes(listing.root)
    before: dict[str, tuple[int, int]] = {}
    if known:
        if not set(known.shard_names) & set(listing.shards):
            raise _other_data(known, file)
        check_shards(known)
        before = {name: (k, known.shard_bytes[k]) for k, name in enumerate(known.shard_names)}
        bounds = np.searchsorted(known.shard, np.arange(len(known.shard_names) + 1))
    parts: dict[int, Rows] = {}
    tasks = []
    sizes = []
    for shard, name in enumerate(listing.shards):
        status = os.stat(listing.root / name)
        sizes.append(status.st_size)
        number, size = before.get(name, (-1, -1))
        if size == status.st_size:
            rows = known.rows.slice(int(bounds[number]), int(bounds[number + 1]))
            if len(rows) and rows.columns["mtime_ns"][0] == status.st_mtime_ns:
                rows.columns["shard"] = np.full(len(rows), shard, np.int32)
                rows.bad = [bad for bad in known.bad if bad.name == name or bad.name.startswith(name + "/")]
                parts[shard] = rows
                continue
        tasks.append((str(listing.root), shard, name))
    if workers is None and len(tasks) <= ONE_PROCESS_SHARDS:
        workers = 1
    scanned = run_tasks("indexing shards", scan_shard, tasks, [1] * len(tasks), workers, progress)
    parts.update({task[1]: rows for task, rows in zip(tasks, scanned, strict=True)})
    rows = Rows.joined([parts[shard] for shard in range(len(listing.shards))])
    highest = int(rows.columns["label"].max(initial=-1))
    if highest >= len(classes):
        classes = [str(label) for label in range(highest + 1)]
    return Index(listing.root, rows, classes, listing.shards, sizes)


def most_are_there(index: Index) -> bool:
    """Whether at least half of some images spread over an index lie where it says, with the size that it says."""
    images = np.unique(np.linspace(0, len(index) - 1, SAMPLED_NAMES).astype(int))
    found = 0
    for image in images:
        try:
            size = os.stat(index.path(image)).st_size
        except OSError:
            continue
        found += int(index.kind == "shards" or size == index.num_bytes[image])
    return 2 * found >= len(images)


def _other_data(index: Index, file: Path | None) -> UsageError:
    return UsageError(
        f"index {file} is of other data than {index.root} holds: of its {len(index):,} images, such as "
        f"{index.name(0)}, fewer than half are there; give the right index, or delete it to build it again"
    )
