"""Where a start goes on: the newest checkpoint that verifies, the same one on every rank, read into the engine.

The checkpoint may have been written by another number of ranks, another ZeRO stage or another library: each rank
reads the stretches that it now holds (shards.py), and nothing is converted.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import RunError, UsageError
from mae_scale.checkpoints.shards import ShardReader
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

log = logging.getLogger("mae_scale")


def load_newest(engine, checkpoints: Path, *, index: str) -> dict[str, Any] | None:
    """Fill the engine from the newest whole checkpoint; its manifest, or None without one.

    Whether it is whole is found out by all ranks together, each reading some files. One that is not is named and set
    aside, and the one before it is taken. All ranks call it. Raises UsageError when it belongs to other images,
    RunError when there are checkpoints and none is usable: a run never starts again from nothing by itself.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    candidates, aside = _from_first(lambda: _candidates(checkpoints))
    for folder in reversed(candidates):
        manifest, damage = _from_first(lambda folder=folder: _manifest(folder))
        if damage is None:
            files = list(manifest["files"].items())[rank::world_size]
            damage = _any(next((w for name, expected in files if (w := damage_of(folder, name, expected))), None))
        if damage is None:
            refuse_other_images(folder, manifest, index)
            damage = _any(_read(engine, folder, manifest))
        if damage is None:
            engine.restored(manifest["scalars"])
            return manifest
        place = _from_first(lambda folder=folder: set_aside(folder))
        aside.append(place)
        if rank == 0:
            log.warning("checkpoint %s is damaged: %s; set aside as %s", folder.name, damage, place.name)
    if aside:
        raise none_usable(checkpoints, aside)
    return None


def newest_readable(checkpoints: Path, *, index: str) -> tuple[int, list[str]]:
    """Return the step that load_newest would go on from, 0 without checkpoints, and what is wrong with newer ones.

    In one process, and nothing is set aside. Raises what load_newest raises.
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
    """Explain that there are checkpoints and none verifies."""
    return RunError(
        f"none of the checkpoints in {checkpoints} is usable ({', '.join(folder.name for folder in aside)}); "
        f"to begin from nothing, move that folder away or choose another --out",
        on_all_ranks=True,
    )


def _candidates(checkpoints: Path) -> tuple[list[Path], list[Path]]:
    for leftover in partial_folders(checkpoints):
        log.warning("%s was left by a save that never ended; the next save removes it", leftover.name)
    return [folder for _, folder in list_checkpoints(checkpoints)], damaged_folders(checkpoints)


def _manifest(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    try:
        return read_manifest(folder), None
    except Damaged as damage:
        return None, str(damage)


def _read(engine, folder: Path, manifest: dict[str, Any]) -> str | None:
    """Fill this rank's pieces; what is missing, or None."""
    try:
        with ShardReader(folder / name for name in manifest["files"]) as reader, torch.no_grad():
            for piece in engine.state().pieces:
                reader.fill(piece)
    except (RunError, OSError) as error:
        return str(error)
    return None


def _from_first(work):
    """Rank 0's answer, for all: ranks may see a folder at different times. Its OSError is everyone's RunError."""
    answer = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            answer = [work(), None]
        except OSError as error:
            answer = [None, f"{error.filename}: {error.strerror}"]
    torch.distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise RunError(answer[1], on_all_ranks=True)
    return answer[0]


def _any(damage: str | None) -> str | None:
    """Return the first rank's complaint, for all; None when no rank has one."""
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, damage)
    return next((d for d in found if d is not None), None)
