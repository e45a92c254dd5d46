"""Checks before the ranks of a start meet, and preparation of the output folder."""

from pathlib import Path
from typing import Any

import torch

from data_pipeline.augment.kinds import Augmentation, augmentation
from data_pipeline.dali_graph import decoding_device
from data_pipeline.errors import UsageError
from data_pipeline.index_build import open_index
from mae_scale.config.required import required
from mae_scale.config.schema import Recipe
from mae_scale.engines.deepspeed_config import deepspeed_config
from mae_scale.engines.policy import layout_of, refuse_wrong_combinations
from mae_scale.tracking.mlflow_uri import tracking_uri
from mae_scale.training.announcement import plan
from mae_scale.training.inputs import (
    IMAGES,
    RECIPE,
    VALIDATION,
    Folder,
    RunImages,
    has_step,
    refuse_other_recipe,
    remove_leftovers,
    run_images,
)
from mae_scale.training.planned import check_rates
from mae_scale.training.schedule import steps_of
from mae_scale.training.task import Task


def check(task: Task[Any], world_size: int) -> None:
    """Raise UsageError for everything that can be refused without reading images; says what to do."""
    recipe, out = task.recipe, task.out
    gpu = torch.cuda.is_available()
    training_root(recipe)
    refuse_wrong_combinations(recipe, gpu=gpu)
    layout = layout_of(recipe, world_size)
    if recipe.engine.backend == "deepspeed":
        deepspeed_config(recipe, layout, gpu=gpu)
    decoding_device(recipe.data.device)
    tracking_uri(recipe.tracking.uri, out)
    check_rates(recipe, gpu=gpu)
    task.check(layout)
    training_augmentation(recipe)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file, expected a folder (or a name for a new one)")
    refuse_other_recipe(recipe, out)


def check_images(task: Task[Any], *, keep: bool = True, progress: bool = True) -> dict[str, RunImages]:
    """Read the indexes of the run's images; return them by the names of their index files in --out.

    Nothing is written into --out; with keep the folders' indexes are written beside them, or into data.index. Takes a
    scan of the folders at a first start, and where they lie elsewhere than at the last one. The images stay those of
    the first start, in the same order; what has turned bad since is replaced and counted by the loader.

    Raises UsageError when the images, or the task's starting weights, do not fit.
    """
    data, root, val_root = task.recipe.data, training_root(task.recipe), task.recipe.data.val_root
    training = Folder("data.root", root, lambda: open_index(root, data.index, keep=keep, progress=progress))
    found = {IMAGES: run_images(task.out / IMAGES, training, task.choose_images, part=task.selects_images)}
    steps_of(task.recipe, len(found[IMAGES].index))  # refuses a batch larger than the data
    if val_root is not None:
        validation = Folder("data.val_root", val_root, lambda: open_index(val_root, keep=keep, progress=progress))
        found[VALIDATION] = run_images(task.out / VALIDATION, validation)
    task.check_fit(found[IMAGES].index, found[VALIDATION].index if VALIDATION in found else None)
    return found


def prepare(task: Task[Any], *, progress: bool = True) -> None:
    """Check everything, then write what the ranks read into --out. Once per start, before the ranks meet."""
    recipe, out = task.recipe, task.out
    inputs = check_images(task, progress=progress)
    refuse_other_recipe(recipe, out)  # another start may have come in between
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not has_step(out):
            remove_leftovers(out, recipe)
        for name, images in inputs.items():
            if not images.is_kept:
                images.index.save(out / name)
        task.keep(inputs[IMAGES].index)
        recipe.save(out / RECIPE)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written to: {error.strerror}") from None


def dry_run(task: Task[Any], world_size: int, *, progress: bool = True) -> list[str]:
    """Check everything and return lines on what a start on `world_size` ranks would do; nothing is written."""
    recipe = task.recipe
    index = check_images(task, keep=False, progress=progress)[IMAGES].index
    layout = layout_of(recipe, world_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return plan(recipe, task.out, index, layout, device)


def training_root(recipe: Recipe) -> Path:
    """Return data.root. Raises UsageError when it is not set."""
    return required(recipe.data.root, "data.root", "add data.root=/path/to/train (a folder of images or of tar shards)")


def training_augmentation(recipe: Recipe) -> Augmentation:
    """Return the recipe's augmentation. Raises UsageError for settings that it does not have."""
    data = recipe.data
    return augmentation(
        data.augmentation,
        crop_scale=data.crop_scale,
        scale_range=data.scale_range,
        flip=data.flip,
        erasing=data.random_erasing,
    )
