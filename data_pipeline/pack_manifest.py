"""Read pack.json, the manifest of a folder of packed shards, and check the shards against it.

pack.json is written last: {"format", "source" (digest of the index that was packed), "options", "classes" (names by
label), "images", "unreadable" ([name, reason]), "shards" ([{"name", "images", "bytes", "sha256", "left_out"}])}.
Until then pack.json.unfinished holds the keys before "unreadable".
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import UsageError, reason_of
from data_pipeline.process_pool import Progress, run_tasks

PACK_NAME = "pack.json"
UNFINISHED_NAME = "pack.json.unfinished"
PACK_FORMAT = 1


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return the content of `path`, None when there is no such file. Raises UsageError when it is damaged."""
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != PACK_FORMAT:
            raise UsageError(f"{path} is of format {found['format']}, expected {PACK_FORMAT}; pack into another folder")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path} is damaged or not a manifest of packed shards; restore it, or pack into another folder"
        ) from None
    return found


def packed_classes(folder: Path) -> list[str]:
    """Return the class names by label, [] when `folder` was not packed. Raises UsageError when it is unfinished."""
    manifest = read_manifest(folder / PACK_NAME)
    if manifest is not None:
        return manifest["classes"]
    if (folder / UNFINISHED_NAME).exists():
        raise UsageError(f"the shards in {folder} are not complete; run the same `mae-scale data pack` again")
    return []


def verify_pack(folder: Path, *, workers: int | None = None, progress: Progress = True) -> list[tuple[str, str]] | None:
    """Return (shard, reason) of the shards that differ from pack.json; None without a pack.json."""
    manifest = read_manifest(folder / PACK_NAME)
    if manifest is None:
        return None
    shards = manifest["shards"]
    tasks = [(str(folder / shard["name"]), shard) for shard in shards]
    counts = [1] * len(tasks)
    reasons = run_tasks("verifying shards", damage, tasks, counts, workers=workers, progress=progress)
    found = [(shard["name"], reason) for shard, reason in zip(shards, reasons, strict=True) if reason]
    unknown = {path.name for path in folder.glob("*.tar")} - {shard["name"] for shard in shards}
    return found + [(name, f"not in {PACK_NAME}") for name in sorted(unknown)]


def damage(task: tuple[str, dict[str, Any]]) -> str:
    """Return the damage of a shard, "" when it is whole; the task is (path, its record in pack.json)."""
    path, record = task
    try:
        num_bytes = os.stat(path).st_size
        if num_bytes != record["bytes"]:
            return f"{num_bytes} bytes, expected {record['bytes']}"
        with open(path, "rb") as file:
            digest = _sha256(file)
    except OSError as error:
        return reason_of(error)
    return "" if digest == record["sha256"] else "its bytes have changed since it was packed (sha256)"


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while some := file.read(2**20):
        digest.update(some)
    return digest.hexdigest()
