"""Resuming: the newest checkpoint that verifies, the same one on every rank, read into the engine.

The checkpoint may have been written by another number of ranks, another ZeRO stage or another library: each rank
reads the stretches that it now holds (shards.py), and nothing is converted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from data_pipeline.errors import RunError, UsageError
from mae_scale.checkpoints.shards import EngineState, ShardReader
from mae_scale.checkpoints.store import (
    Damaged,
    damage_of,
    damaged_folders,
    list_checkpoints,
    partial_folders,
    read_manifest,
    set_aside,
    verify,
)
from mae_scale.distributed.collectives import from_all, from_first

log = logging.getLogger("mae_scale")


class Resumable(Protocol):
    """An engine as a checkpoint sees it."""

    def state(self) -> EngineState:
        """Return this rank's part of the training state, as views of it."""

    def restored(self, scalars: dict[str, Any]) -> None:
        """Adopt the values copied into the pieces of state(), and the scalars beside them."""


def load_newest(engine: Resumable, checkpoints: Path, *, index: str) -> dict[str, Any] | None:
    """Fill the engine from the newest whole checkpoint; return its manifest, or None without one. All ranks call it.

    A damaged checkpoint is named and set aside, and the one before it is taken. Raises UsageError when the checkpoint
    belongs to other images, RunError when there are checkpoints and none is usable: a run never begins again by itself.
    """
    candidates, aside = from_first(lambda: _candidates(checkpoints))
    for folder in reversed(candidates):
        try:
            return _load(engine, folder, index)
        except Damaged as damage:
            place = from_first(partial(set_aside, folder))
            aside.append(place)
            if torch.distributed.get_rank() == 0:
                log.warning("checkpoint %s is damaged: %s; set aside as %s", folder.name, damage, place.name)
    if aside:
        raise none_usable(checkpoints, aside)
    return None


def _load(engine: Resumable, folder: Path, index: str) -> dict[str, Any]:
    """Fill the engine from a checkpoint, each rank reading a share of the files; return its manifest.

    Raises Damaged on all ranks when any rank finds damage, UsageError when it belongs to other images.
    """
    manifest, unreadable = from_first(lambda: _manifest(folder))
    if manifest is None:
        raise Damaged(unreadable)
    _raise_damage(lambda: _damage_of_share(folder, manifest))
    refuse_other_images(folder, manifest, index)
    _raise_damage(lambda: _fill(engine, folder, manifest))
    engine.restored(manifest["scalars"])
    return manifest


def newest_readable(checkpoints: Path, *, index: str) -> tuple[int, list[str]]:
    """Return the step that load_newest would resume from, 0 without checkpoints, and the damages of newer ones.

    For one process; sets nothing aside. Raises what load_newest raises.
    """
    damages = []
    for step, folder in reversed(list_checkpoints(checkpoints)):
        try:
            refuse_other_images(folder, verify(folder), index)
        except Damaged as damage:
            damages.append(f"{folder.name} is damaged and would be set aside: {damage}")
        else:
            return step, damages
    aside = [*damaged_folders(checkpoints), *(folder for _, folder in list_checkpoints(checkpoints))]
    if aside:
        raise none_usable(checkpoints, aside)
    return 0, []


def refuse_other_images(folder: Path, manifest: dict[str, Any], index: str) -> None:
    """Raise UsageError when a checkpoint belongs to images with another index."""
    if manifest["index"] != index:
        raise UsageError(
            f"checkpoint {folder} belongs to image index {manifest['index']}, this start has {index}; "
            f"start it with the same images, or with another --out"
        )


def none_usable(checkpoints: Path, aside: list[Path]) -> RunError:
    """Return the error that there are checkpoints and none verifies."""
    return RunError(
        f"none of the checkpoints in {checkpoints} is usable ({', '.join(folder.name for folder in aside)}); "
        f"to begin from nothing, move that folder away or choose another --out",
        on_all_ranks=True,
    )


def _candidates(checkpoints: Path) -> tuple[list[Path], list[Path]]:
    """Return the checkpoints, oldest first, and those set aside earlier; warn of unfinished ones."""
    for leftover in partial_folders(checkpoints):
        log.warning("%s was left by a save that never ended; the next save removes it", leftover.name)
    return [folder for _, folder in list_checkpoints(checkpoints)], damaged_folders(checkpoints)


def _manifest(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Return a checkpoint's manifest and "", or None and its damage."""
    try:
        return read_manifest(folder), ""
    except Damaged as damage:
        return None, str(damage)


def _damage_of_share(folder: Path, manifest: dict[str, Any]) -> str | None:
    """Read this rank's share of a checkpoint's files; return the damage of the first damaged one, or None."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    files = list(manifest["files"].items())[rank::world_size]
    return next((damage for name, expected in files if (damage := damage_of(folder, name, expected))), None)


def _fill(engine: Resumable, folder: Path, manifest: dict[str, Any]) -> str | None:
    """Fill this rank's pieces; return what is missing, or None."""
    try:
        with ShardReader(folder / name for name in manifest["files"]) as reader, torch.no_grad():
            for piece in engine.state().pieces:
                reader.fill(piece)
    except (RunError, OSError) as error:
        return str(error)
    return None


def _raise_damage(find: Callable[[], str | None]) -> None:
    """Raise Damaged on all ranks with the first rank's finding, if any rank has one."""
    found = [damage for damage in from_all(find) if damage is not None]
    if found:
        raise Damaged(found[0])
