"""The folder of a run's checkpoints: list, verify, set aside, retain.

DIR/
    frozen.safetensors                   the weights that the run does not train, where there are any
    checkpoints/
        step_00001250/
            rank_00000.safetensors ...   each rank's pieces of the state (shards.py)
            manifest.json                every file's size and digest, step, epoch, world size, ...; written last
        .step_00002500.partial/          being written, or left by a run that died while it wrote
        damaged_step_00000750/           set aside: it did not verify
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import RunError
from data_pipeline.files import sync, write_json
from mae_scale.checkpoints.shards import digest_of

log = logging.getLogger("mae_scale")

MANIFEST = "manifest.json"
DAMAGED = "damaged_"
FROZEN = "frozen.safetensors"


@dataclass(frozen=True)
class Retention:
    """Rule for the checkpoints to keep: the newest `keep`, those of every n-th epoch's end, the best by a metric."""

    keep: int
    every_epochs: int | None = None
    best: str | None = None
    """train/loss: the mean since the checkpoint before; else a metric that was measured at the checkpoint's step."""


class Damaged(Exception):
    """A checkpoint that is not whole; the text names the file and what is wrong with it."""


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return checkpoints / f"step_{step:08d}"


def partial_folder_of(checkpoints: Path, step: int) -> Path:
    """Return the folder in which a step's checkpoint is written before it gets its name."""
    return checkpoints / f".step_{step:08d}.partial"


def frozen_weights_of(checkpoint: Path) -> Path:
    """Return the file of the weights that the checkpoint's run does not train."""
    return checkpoint.absolute().parents[1] / FROZEN


def list_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of all folders with a checkpoint's name, oldest first; whole or not."""
    found = []
    for folder in checkpoints.glob("step_*"):
        number = folder.name.removeprefix("step_")
        if folder.is_dir() and number.isdigit():
            found.append((int(number), folder))
    return sorted(found)


def write_manifest(folder: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Write a checkpoint's last file: the facts, each file's {"bytes", "sha256"}, and a digest of itself."""
    content = {**facts, "files": files}
    content["manifest_sha256"] = _digest_of_manifest(content)
    write_json(folder / MANIFEST, content)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest, checked against its own digest. Raises Damaged."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        meant = content["manifest_sha256"]
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing, so it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error}") from None
    if _digest_of_manifest(content) != meant:
        raise Damaged(f"{MANIFEST} is not what was written: its digest differs")
    return content


def damage_of(folder: Path, name: str, expected: dict[str, Any]) -> str | None:
    """Read a checkpoint's whole file; return what is wrong with it, or None."""
    path = folder / name
    try:
        found = path.stat().st_size
        if found != expected["bytes"]:
            return f"{name} has {found:,} bytes, expected {expected['bytes']:,}"
        if digest_of(path) != expected["sha256"]:
            return f"{name} is not what was written: its digest differs"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def verify(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest after reading and comparing every file. Raises Damaged with all damages."""
    manifest = read_manifest(folder)
    wrong = [w for name, expected in manifest["files"].items() if (w := damage_of(folder, name, expected))]
    if wrong:
        raise Damaged("; ".join(wrong))
    return manifest


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for a usable one; return its new folder."""
    place, number = folder.with_name(DAMAGED + folder.name), 1
    while place.exists():
        number += 1
        place = folder.with_name(f"{DAMAGED}{folder.name}_{number}")
    folder.rename(place)
    sync(folder.parent)
    return place


def damaged_folders(checkpoints: Path) -> list[Path]:
    """Return the checkpoints that were set aside."""
    return sorted(checkpoints.glob(f"{DAMAGED}step_*"))


def partial_folders(checkpoints: Path) -> list[Path]:
    """Return the folders of unfinished saves."""
    return sorted(checkpoints.glob(".step_*.partial"))


def remove(folder: Path) -> None:
    """Delete a checkpoint, its name first: if the process dies meanwhile, no half of it has that name."""
    if folder.name.startswith("step_"):
        folder = folder.rename(folder.with_name(f".{folder.name}.partial"))
    shutil.rmtree(folder)


def beyond(checkpoints: Path, retention: Retention) -> list[Path]:
    """Return the checkpoints that a retention does not keep, oldest first; none without a readable manifest."""
    manifests = {}
    for _, folder in list_checkpoints(checkpoints):
        try:
            manifests[folder] = read_manifest(folder)
        except Damaged:
            continue
    kept = set(list(manifests)[-retention.keep :])
    if n := retention.every_epochs:
        kept |= {f for f, m in manifests.items() if m["epoch"] == int(m["epoch"]) and int(m["epoch"]) % n == 0}
    if retention.best:
        values = {folder: _value(manifest, retention.best) for folder, manifest in manifests.items()}
        known = {folder: value for folder, value in values.items() if value is not None}
        if known:
            kept.add((min if retention.best.endswith("loss") else max)(known, key=lambda folder: known[folder]))
    return [folder for folder in manifests if folder not in kept]


def _value(manifest: dict[str, Any], metric: str) -> float | None:
    """Return a metric of a checkpoint; None where it was not measured."""
    value: float | None = manifest["loss"] if metric == "train/loss" else manifest.get("measured", {}).get(metric)
    return value


def newest_whole(checkpoints: Path) -> tuple[Path, dict[str, Any]]:
    """Return the newest checkpoint that verifies, and its manifest; warn of newer, damaged ones.

    Raises RunError with all damages when there is none.
    """
    wrong = []
    for _, folder in reversed(list_checkpoints(checkpoints)):
        try:
            manifest = verify(folder)
        except Damaged as damage:
            wrong.append(f"{folder.name}: {damage}")
        else:
            if wrong:
                log.warning("%s is used, because newer checkpoints are damaged (%s)", folder.name, "; ".join(wrong))
            return folder, manifest
    raise RunError(f"{checkpoints} holds no whole checkpoint" + (f" ({'; '.join(wrong)})" if wrong else ""))


def size_of(folder: Path) -> int:
    """Return the size of all files below a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _digest_of_manifest(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
