"""The page of a run in MLflow: its name, what it is in words, and its images."""

import shlex
import sys
from typing import Any

from data_pipeline.image_size import size_text
from data_pipeline.index import Index, load_index
from mae_scale.tracking.mlflow_page import Images, RunPage
from mae_scale.training.context import RunContext
from mae_scale.training.inputs import VALIDATION
from mae_scale.training.task import Task


def run_page(task: Task[Any], context: RunContext) -> RunPage:
    """Return the page of a run; on rank 0, whose command line it names."""
    recipe = task.recipe
    encoder, sizes = task.model_in_words()
    images = [_images(context.index, "training")]
    if recipe.data.val_root is not None:
        images.append(_images(load_index(context.out / VALIDATION, recipe.data.val_root), "validation"))
    lines = [
        f"**{task.kind}** of {encoder} ({sizes}) at {size_text(recipe.model.image_size)} px: {recipe.schedule.epochs} "
        f"epochs of {len(context.index):,} images, global batch {recipe.data.global_batch}, seed {recipe.seed}.",
        # In backticks it wraps: a block would be one long line, and push MLflow's column of tags out of the window.
        f"``{shlex.join(['mae-scale', *sys.argv[1:]])}``",
        "The same command goes on with this run, on any number of ranks, from the newest checkpoint in "
        f"`{context.checkpoints.absolute()}`.",
    ]
    started_from = context.facts.get("started_from")
    if started_from:
        its_run = started_from.get("mlflow_run_id")
        lines.append(f"Weights: `{started_from['path']}`" + (f", MLflow run `{its_run}`" if its_run else ""))
    name = f"{context.out.name}, {task.kind} {encoder}, seed {recipe.seed}"
    return RunPage(name, "\n\n".join(lines), tuple(images), recipe.tracking.sweep)


def _images(index: Index, role: str) -> Images:
    folder = index.root
    name = "/".join(folder.parts[-2:]).strip("/")
    return Images(name, index.digest(), str(folder), role, len(index), len(index.classes))
