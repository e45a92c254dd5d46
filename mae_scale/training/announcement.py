"""The lines that a start prints: at its beginning, when nothing is left to do, and under --dry-run."""

import math
import os
from pathlib import Path

import torch

from data_pipeline.batch_layout import BatchLayout
from data_pipeline.errors import UsageError
from data_pipeline.index import Index
from mae_scale.checkpoints.resume import newest_readable
from mae_scale.config.schema import Recipe
from mae_scale.engines.policy import engine_name
from mae_scale.training.provenance import describe_settings, settings_used
from mae_scale.training.run_lock import refuse_held
from mae_scale.training.schedule import Steps, steps_of


def headline(recipe: Recipe, index: Index, layout: BatchLayout, device: torch.device, start: int) -> str:
    """Return lines about a start that resumes after `start` updates, and about data that is not used."""
    steps, used = steps_of(recipe, len(index)), settings_used(recipe, layout, device)
    whence = f"going on from step {start}" if start else "from the beginning"
    if start >= steps.last:
        whence = f"all {start} steps are done" if start == steps.total else f"{start} steps are done"
    remarks = "".join(f"{line}\n" for line in index.remarks.sentences())
    return (
        f"{index.summary()}; {steps.per_epoch} steps per epoch, {recipe.schedule.epochs} epochs, "
        f"{steps.total} steps; {whence}\n{remarks}"
        f"{engine_name(recipe)}, {layout.world_size} rank(s) on {device.type} x {layout.micro_batch} images "
        f"x {layout.accumulation} = global batch {layout.global_batch}; {describe_settings(used)}; "
        f"peak lr {recipe.lr:.3g}"
    )


def nothing_to_do(recipe: Recipe, steps: Steps, start: int) -> str:
    """Return why a start that finds `start` updates done ends at once."""
    if start >= steps.total:
        return f"nothing to do: all {steps.total} steps are done"
    return (
        f"nothing to do: step {start} is done already, and schedule.stop_after_steps="
        f"{recipe.schedule.stop_after_steps}; choose more of the {steps.total} steps, or null for all of them"
    )


def plan(recipe: Recipe, out: Path, index: Index, layout: BatchLayout, device: torch.device) -> list[str]:
    """Return lines on what a start would do in the folder `out`, summarised in the last; nothing is written.

    Raises UsageError or RunError where the start would be refused because of the folder's content.
    """
    _refuse_unwritable(out)
    refuse_held(out)
    steps = steps_of(recipe, len(index))
    start, damages = newest_readable(out / "checkpoints", index=index.digest())
    if start >= steps.last:
        would = nothing_to_do(recipe, steps, start)
    else:
        began = f"go on from step {start} ({out}/checkpoints)" if start else "begin with step 1"
        would = f"it would {began} and end after step {steps.last}"
    return [
        headline(recipe, index, layout, device, start),
        *damages,
        _schedule(recipe, steps),
        f"dry run, nothing was written: {would}",
    ]


def _schedule(recipe: Recipe, steps: Steps) -> str:
    checkpoint, warmup = recipe.checkpoint, round(recipe.schedule.warmup_epochs * steps.per_epoch)
    every = [f"{checkpoint.every_steps} steps"] if checkpoint.every_steps else []
    if checkpoint.every_epochs:
        every.append(f"{checkpoint.every_epochs * steps.per_epoch} steps ({checkpoint.every_epochs} epochs)")
    rises = f"rises to {recipe.lr:.3g} over {warmup} steps" if warmup else f"begins at {recipe.lr:.3g}"
    when = "".join(f"every {interval}, " for interval in every) + "at the end"
    at = [str(math.ceil(epoch * steps.per_epoch)) for epoch in recipe.schedule.step_epochs]
    falls = f"a tenth from step {' and '.join(at)} on" if at else f"falls to 0 at step {steps.total}"
    return f"learning rate: {rises} and {falls}; checkpoints: {when}"


def _refuse_unwritable(out: Path) -> None:
    """Raise UsageError when the output folder could not be made or written to."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "Permission denied" if place.is_dir() else "Not a directory"
        raise UsageError(f"--out {out} cannot be written to: {reason}")
