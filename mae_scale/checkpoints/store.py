"""Checkpoints of a run: written beside their place, listed in a manifest, renamed into it, pruned.

DIR/checkpoints/step_00001250/
    engine/...       what each rank's engine wrote
    manifest.json    files and sizes, step, world size, engine, recipe digest, versions; written last
"""

import json
import os
import shutil
from pathlib import Path

import torch

from mae_scale.errors import RunError

MANIFEST = "manifest.json"


def save_checkpoint(engine, folder: Path, step: int, facts: dict, keep: int) -> Path:
    """Every rank writes its part; then the checkpoint appears whole under its name, and old ones go. All ranks call it.

    facts go into the manifest as they are. Returns the checkpoint's folder.
    """
    place = folder / f"step_{step:08d}"
    beside = folder / f".step_{step:08d}.partial"
    first = torch.distributed.get_rank() == 0
    if first:
        for leftover in folder.glob(".step_*.partial"):
            shutil.rmtree(leftover)
        beside.mkdir(parents=True)
    torch.distributed.barrier()
    engine.save(beside)
    torch.distributed.barrier()
    if first:
        _write_manifest(beside, {"step": step, **facts})
        if place.exists():
            shutil.rmtree(place)
        beside.rename(place)
        _sync(folder)
        for _, old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    torch.distributed.barrier()
    return place


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint with a manifest, oldest first."""
    found = [(int(m.parent.name.removeprefix("step_")), m.parent) for m in folder.glob(f"step_*/{MANIFEST}")]
    return sorted(found)


def read_manifest(checkpoint: Path) -> dict:
    """The manifest, after a look that every file it lists is there with its size; RunError naming one that is not."""
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    for name, size in manifest["files"].items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else "no file"
        if found != size:
            raise RunError(
                f"checkpoint {checkpoint} is damaged: {name} has {found}, its manifest says {size} bytes; "
                f"move the folder away to go on from the checkpoint before it"
            )
    return manifest


def _write_manifest(folder: Path, facts: dict) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _sync(path)
        files[str(path.relative_to(folder))] = path.stat().st_size
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**facts, "files": files}, indent=1) + "\n", encoding="utf-8")
    _sync(manifest)
    _sync(folder)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
