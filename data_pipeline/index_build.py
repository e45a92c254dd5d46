"""Build the index of a data folder, and open it again: new and changed files are read, the rest is kept."""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.arrays import Int64Array
from data_pipeline.errors import UsageError
from data_pipeline.folder_listing import Listing, folder_problem, list_folder
from data_pipeline.index import INDEX_NAME, DamagedIndex, Index, Remarks, load_index
from data_pipeline.index_rows import Rows
from data_pipeline.index_scan import ONE_PROCESS_IMAGES, ONE_PROCESS_SHARDS, same_file, scan_names, scan_shard
from data_pipeline.pack_manifest import packed_classes
from data_pipeline.process_pool import Progress, run_tasks

SAMPLED_NAMES = 64
NAMES_SHOWN = 5

log = logging.getLogger("data_pipeline")


def build_index(root: str | os.PathLike[str], *, workers: int | None = None, progress: Progress = True) -> Index:
    """Index every image under `root` (an image folder, flat or with a folder per class, or tar shards).

    Where the first level holds only folders of folders, as in iNaturalist and Places, the inner folders are classes.
    `workers` processes read the headers (default: one per core); `progress` shows a bar, or is called with
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
    """Return the index of `root`, from `path` (default: root/.mae_scale_index.npz), built and written when absent.

    With `refresh`, files that are new or changed (by size and modification time) are read again and files
    that are gone are dropped; a damaged index is built again, with a warning. A run that resumes uses
    `refresh=False`, so that its order does not change. Without `keep` nothing is written.
    Raises UsageError when the index is of other data, `path` is a file of another kind or cannot be written, or a
    shard has shrunk.
    """
    root = Path(root)
    file = Path(path) if path else root / INDEX_NAME
    if not os.path.exists(file):
        index = build_index(root, workers=workers, progress=progress)
        if keep:
            _write(index, file, given=path is not None)
        return index
    try:
        index = load_index(file, root)
    except DamagedIndex:
        if not refresh or not _may_be_an_index(file):
            raise
        log.warning("index %s is damaged or of another format; it is built again", file)
        index = build_index(root, workers=workers, progress=progress)
        if keep:
            _write(index, file, given=path is not None)
        return index
    if not refresh:
        check_data(index)
        if not most_are_there(index):
            raise _other_data(index, file)
        return index
    fresh = _scan(root, index, workers, progress, file)
    same = fresh.digest() == index.digest() and fresh.unreadable == index.unreadable and fresh.remarks == index.remarks
    if keep and (fresh.rows.read or not same):
        _write(fresh, file, given=path is not None)
    return fresh


def check_data(index: Index) -> None:
    """Raise UsageError when the data folder is gone, or a shard is missing or smaller than when it was indexed."""
    if problem := folder_problem(index.root):
        raise UsageError(f"{problem}; mount or restore it, or give data.root where the data lie now")
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
                "copy it again, or delete the index if this is intended"
            )


def _may_be_an_index(file: Path) -> bool:
    """Return whether a damaged file may be overwritten as an index: it is named as one, begins as one or is empty."""
    with open(file, "rb") as opened:
        return file.suffix == ".npz" or opened.read(4) in (b"", b"PK\3\4")


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
    scan = _scan_shards if listing.shards else _scan_images
    index = scan(listing, known, workers, progress, file)
    lines = [*_without_images(index), *listing.loops, *index.remarks.lines]
    index.remarks = Remarks(index.remarks.left_out, lines)
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
    parts = run_tasks("indexing images", scan_names, tasks, counts, workers=workers, progress=progress)
    rows = Rows.joined(parts)
    remarks = Remarks({"": listing.left_out} if listing.left_out else {}, _named_twice(rows))
    fresh = Index(listing.root, rows, listing.classes, remarks=remarks)
    if known and 2 * fresh.rows.same < len(known):
        raise _other_data(known, file)
    return fresh


def _range(count: int, name: Callable[[int], bytes], first: bytes, last: bytes) -> tuple[int, int]:
    """Return the rows whose sorted names lie from `first` to `last`."""
    rows = range(count)
    return bisect_left(rows, first, key=name), bisect_left(rows, last + b"\0", key=name)


def _scan_shards(
    listing: Listing, known: Index | None, workers: int | None, progress: Progress, file: Path | None
) -> Index:
    classes = packed_classes(listing.root)
    if known:
        if not set(known.shard_names) & set(listing.shards):
            raise _other_data(known, file)
        check_data(known)
    statuses = [os.stat(listing.root / name) for name in listing.shards]
    parts: dict[int, Rows] = {}
    left_out: dict[str, dict[str, int]] = {}
    tasks = []
    for shard, (name, status) in enumerate(zip(listing.shards, statuses, strict=True)):
        rows = _rows_before(known, name, status) if known else None
        if known is None or rows is None:
            tasks.append((str(listing.root), shard, name))
        else:
            rows.columns["shard"] = np.full(len(rows), shard, np.int32)
            parts[shard], left_out[name] = rows, known.remarks.left_out.get(name, {})
    if workers is None and len(tasks) <= ONE_PROCESS_SHARDS:
        workers = 1
    counts = [1] * len(tasks)
    scanned = run_tasks("indexing shards", scan_shard, tasks, counts, workers=workers, progress=progress)
    for (_, shard, name), (rows, others) in zip(tasks, scanned, strict=True):
        parts[shard], left_out[name] = rows, others
    rows = Rows.joined([parts[shard] for shard in range(len(listing.shards))])
    files = np.array([same_file(status, name) for status, name in zip(statuses, listing.shards, strict=True)], np.int64)
    twice = _twice(files, listing.shards.__getitem__, "shards")
    sizes = [status.st_size for status in statuses]
    highest = int(rows.columns["label"].max(initial=-1))
    if highest >= len(classes):
        classes = [str(label) for label in range(highest + 1)]
    left_out = {name: left_out[name] for name in listing.shards if left_out[name]}
    if listing.left_out:
        left_out[""] = listing.left_out
    remarks = Remarks(left_out, twice)
    return Index(listing.root, rows, classes, listing.shards, shard_bytes=sizes, remarks=remarks)


def _rows_before(known: Index, name: str, status: os.stat_result) -> Rows | None:
    """Return a shard's rows in an earlier index, None when it is new or changed, or has no orientations there."""
    if name not in known.shard_names:
        return None
    number = known.shard_names.index(name)
    first, last = np.searchsorted(known.shard, [number, number + 1]).tolist()
    rows = known.rows.slice(first, last)
    is_same = known.shard_bytes[number] == status.st_size and len(rows) > 0
    if not is_same or rows.columns["mtime_ns"][0] != status.st_mtime_ns or not rows.columns["orientation"][0]:
        return None
    rows.bad = [bad for bad in known.bad if bad.name == name or bad.name.startswith(name + "/")]
    return rows


def _without_images(index: Index) -> list[str]:
    """Return a line on the classes without a readable image."""
    held = np.bincount(index.label[index.label >= 0], minlength=len(index.classes))
    empty = [index.classes[label] for label in np.flatnonzero(held == 0)]
    if not empty:
        return []
    names = ", ".join(empty[:NAMES_SHOWN]) + (", ..." if len(empty) > NAMES_SHOWN else "")
    return [f"classes without an image, still counted: {len(empty):,} ({names})"]


def _named_twice(rows: Rows) -> list[str]:
    """Return a line on the images that are one file under several names, through symbolic or hard links."""
    return _twice(rows.files, lambda row: os.fsdecode(rows.name(row)), "images")


def _twice(files: Int64Array, name: Callable[[int], str], what: str) -> list[str]:
    """Return a line on equal numbers in `files`; `name` gives the name of a row, `what` the rows' kind."""
    order = np.argsort(files, kind="stable")
    again = np.flatnonzero(np.diff(files[order]) == 0)
    if not len(again):
        return []
    first = again[np.argmin(order[again])]
    example = f"{name(int(order[first]))} and {name(int(order[first + 1]))} are one file"
    return [f"{what} under a second name through links, used once per name: {len(again):,} ({example})"]


def most_are_there(index: Index) -> bool:
    """Return whether at least half of a sample of images exist at their paths with their sizes."""
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
