"""Pack an image folder as WebDataset tar shards; training from them equals training from the folder to the last bit.

The images are divided into shards in the order of the index, so that the index of the shards lists the same images in
the same order, with the same labels, classes and sizes: plans, crops and pixels are equal. The content of a shard
depends on the index and the options alone, never on the processes that write it. A member is named after the image's
path; its label is the `.cls` member beside it; class names are in pack.json.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.byte_reader import ByteReader
from data_pipeline.errors import BadImage, RunError, UsageError
from data_pipeline.files import TEMPORARY, whole_file, write_json
from data_pipeline.index import Index
from data_pipeline.index_build import open_index
from data_pipeline.pack_manifest import PACK_FORMAT, PACK_NAME, UNFINISHED_NAME, damage, read_manifest
from data_pipeline.process_pool import Progress, run_tasks
from data_pipeline.shrink_image import JPEG_SUFFIXES, Shrinking, shrunk

SHARD_MIB = 256
BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class ShardTask:
    """A shard to write: the index of its images, in order; `suffix` is the most common one of all images."""

    images: Index
    folder: Path
    name: str
    suffix: bytes
    shrinking: Shrinking | None
    record: dict[str, Any] | None  # in pack.json, where that exists already


def pack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    shrinking: Shrinking | None = None,
    shard_mib: int = SHARD_MIB,
    workers: int | None = None,
    progress: Progress = True,
) -> tuple[Index, list[tuple[str, str]]]:
    """Pack the images of `source` as shards of about `shard_mib` MiB in `target`, and write their index.

    Returns the index of the shards and (name, reason) of the images that were left out. Called
    again after an interruption, or on a damaged pack, it keeps the shards whose digest is right and writes the rest.
    Raises UsageError when `source` has no readable image, `target` lies inside it, cannot be written to, or holds
    something else or shards of other data or options; RunError when a shard cannot be written or an image has changed.
    """
    source, target = Path(source), Path(target)
    _check_places(source, target)
    index = open_index(source, workers=workers, progress=progress)
    header = _header(index, shrinking, shard_mib)
    with _begun(target, header) as records:
        suffix = _suffix(index)
        tasks = [
            ShardTask(part, target, name, suffix, shrinking=shrinking, record=records.get(name))
            for name, part in _shards(index, shrinking, shard_mib * 2**20)
        ]
        counts = [len(task.images) for task in tasks]
        written = run_tasks("packing images", write_shard, tasks, counts, workers=workers, progress=progress)
        shards = [{key: value for key, value in record.items() if key != "format"} for record in written]
        try:
            write_json(target / PACK_NAME, {**header, "unreadable": index.unreadable, "shards": shards})
            (target / UNFINISHED_NAME).unlink(missing_ok=True)
            for task in tasks:
                _record_path(target / task.name).unlink(missing_ok=True)
        except OSError as error:
            raise _unwritten(target / PACK_NAME, error) from None
    left_out = [(name, reason) for record in written for name, reason in record["left_out"]]
    return open_index(target, workers=workers, progress=progress), index.unreadable + left_out


def _check_places(source: Path, target: Path) -> None:
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents:
        raise UsageError(f"the shards would lie in {target}, inside the images' folder {source}; give another folder")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target} is not a folder; give a new folder for the shards")


def _header(index: Index, shrinking: Shrinking | None, shard_mib: int) -> dict[str, Any]:
    options: dict[str, Any] = {"shard_mib": shard_mib, "shorter_side": None}
    if shrinking is not None:
        import PIL
        from PIL import features

        options |= {"shorter_side": shrinking.shorter_side, "quality": shrinking.quality}
        options["encoder"] = f"Pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
    return {
        "format": PACK_FORMAT,
        "source": index.digest(),
        "options": options,
        "classes": index.classes,
        "images": len(index),
    }


@contextmanager
def _begun(target: Path, header: dict[str, Any]) -> Iterator[dict[str, dict[str, Any]]]:
    """Create or continue `target`, alone; yield the records of its shards by name when it is finished, else none.

    Raises UsageError when it cannot be written to or is not a pack of the same images with the same options.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        lock = os.open(target, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{target} cannot be written to: {error.strerror}; give another folder") from None
    try:
        _lock(lock, target)
        finished = read_manifest(target / PACK_NAME)
        before = finished or read_manifest(target / UNFINISHED_NAME)
        if before is not None:
            _check_same(target, before, header)
        elif any(not path.name.endswith(TEMPORARY) for path in target.iterdir()):
            raise UsageError(f"{target} is not empty and holds no packed shards; give a new folder")
        for path in target.glob(f".*{TEMPORARY}"):  # of a process that was killed
            path.unlink(missing_ok=True)
        if before is None:
            try:
                write_json(target / UNFINISHED_NAME, header)
            except PermissionError as error:
                raise UsageError(f"{target} cannot be written to: {error.strerror}; give another folder") from None
            except OSError as error:
                raise _unwritten(target / UNFINISHED_NAME, error) from None
        yield {shard["name"]: shard for shard in finished["shards"]} if finished else {}
    finally:
        os.close(lock)


def _lock(folder: int, target: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another process is packing into {target}; wait for it") from None
    except OSError:  # a file system without locks
        return


def _check_same(target: Path, before: dict[str, Any], header: dict[str, Any]) -> None:
    advice = "give another folder, or delete this one"
    if before["source"] != header["source"]:
        raise UsageError(
            f"{target} holds shards of other images ({before['images']:,} of index {before['source'][:8]}; these are "
            f"{header['images']:,} of {header['source'][:8]}); {advice}"
        )
    old, new = before["options"], header["options"]
    if old != new:
        changes = ", ".join(
            f"{key} {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
        )
        raise UsageError(f"{target} holds shards packed with other options ({changes}); {advice}")


def _shards(index: Index, shrinking: Shrinking | None, shard_bytes: int) -> Iterator[tuple[str, Index]]:
    """Yield (name, images) of each shard; one begins where the members before it fill a multiple of `shard_bytes`."""
    num_bytes = index.num_bytes.astype(np.float64)
    if shrinking is not None:
        shorter = np.minimum(index.height, index.width)
        num_bytes *= np.minimum(1, shrinking.shorter_side / shorter) ** 2  # an estimate from the index alone
    members = BLOCK + np.ceil(num_bytes / BLOCK) * BLOCK + np.where(index.label < 0, 0, 2 * BLOCK)
    numbers = (np.cumsum(members) - members) // shard_bytes
    bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(index)]
    for number, (first, last) in enumerate(pairwise(bounds)):
        rows = index.rows.slice(first, last)
        yield f"{number:06d}.tar", Index(index.root, rows, [], index.shard_names, shard_bytes=index.shard_bytes)


def _suffix(index: Index) -> bytes:
    """Return the suffix of most images, such as b"JPEG"."""
    counts = Counter(index.rows.name(row).rpartition(b".")[2] for row in range(len(index)))
    return max(counts, key=lambda suffix: (counts[suffix], suffix))


def member_key(path: bytes, common_suffix: bytes) -> tuple[bytes, bytes]:
    """Return key and suffix of an image's member: its path, escaped where WebDataset would read it otherwise.

    A key ends at the first dot of a file's name, and all members of one sample share it: other dots are written
    as %2E (and % as %25), and a less common suffix joins the key, so that a.jpg and a.png stay two samples.
    """
    folder, slash, base = path.rpartition(b"/")
    stem, _, suffix = base.rpartition(b".")
    stem = stem.replace(b"%", b"%25").replace(b".", b"%2E")
    return folder + slash + stem + (b"" if suffix == common_suffix else b"%" + suffix), suffix


def write_shard(task: ShardTask) -> dict[str, Any]:
    """Write a shard, unless it exists with the right digest; return its record.

    Raises RunError when it cannot be written, or an image has changed since it was indexed.
    """
    path = task.folder / task.name
    try:
        record = task.record or read_manifest(_record_path(path))
    except UsageError:
        record = None
    if record is not None and not damage((str(path), record)):
        return record
    digest, num_bytes, num_images = hashlib.sha256(), 0, 0
    left_out: list[tuple[str, str]] = []
    try:
        with whole_file(path) as file:
            for member in _members(task, left_out):
                file.write(member)
                digest.update(member)
                num_bytes += len(member)
                num_images += 1
            file.write(bytes(2 * BLOCK))
            digest.update(bytes(2 * BLOCK))
        record = {
            "format": PACK_FORMAT,
            "name": task.name,
            "images": num_images,
            "bytes": num_bytes + 2 * BLOCK,
            "sha256": digest.hexdigest(),
            "left_out": left_out,
        }
        write_json(_record_path(path), record)
    except OSError as error:
        raise _unwritten(path, error) from None
    return record


def _members(task: ShardTask, left_out: list[tuple[str, str]]) -> Iterator[bytes]:
    """Yield the tar members of each image and its label."""
    images = task.images
    reader = ByteReader(images)
    for row in range(len(images)):
        name = images.name(row)
        try:
            data = reader.read(row).tobytes()
        except BadImage as error:
            raise RunError(
                f"{images.root}/{name}: {error}; restore it as it was indexed and run the same command again, or "
                "pack into another folder"
            ) from None
        key, suffix = member_key(os.fsencode(name), task.suffix)
        side = min(int(images.height[row]), int(images.width[row]))
        if task.shrinking is not None and side > task.shrinking.shorter_side:
            try:
                smaller = shrunk(data, task.shrinking, int(images.orientation[row]))
            except BadImage as error:
                left_out.append((name, str(error)))
                continue
            if smaller is not None:
                data = smaller
                suffix = suffix if suffix.lower() in JPEG_SUFFIXES else b"jpg"
        label = int(images.label[row])
        yield _member(key + b"." + suffix, data) + (b"" if label < 0 else _member(key + b".cls", b"%d" % label))


def _member(name: bytes, data: bytes) -> bytes:
    """Return a tar member that is independent of time, user and machine."""
    header = tarfile.TarInfo(os.fsdecode(name))
    header.size = len(data)
    return header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + data + bytes(-len(data) % BLOCK)


def _record_path(shard: Path) -> Path:
    return shard.with_name(f".{shard.name}.json")


def _unwritten(path: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write {path}: {error.strerror}; make room and run the same command again, whole shards are kept"
    )
