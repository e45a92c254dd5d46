"""The tasks, by the name that a recipe's `task:` gives. A new task is a folder beside this file and one line here."""

from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError
from mae_scale.config.schema import Recipe
from mae_scale.tasks.beit.task import BeitPretraining
from mae_scale.tasks.classification.task import Classification
from mae_scale.tasks.dvae.task import DiscreteVaeTraining
from mae_scale.tasks.mae.task import MaskedAutoencoding
from mae_scale.tasks.moco.task import MomentumContrast
from mae_scale.training.task import Task

TASKS: dict[str, type[Task[Any]]] = {
    "mae": MaskedAutoencoding,
    "beit": BeitPretraining,
    "moco": MomentumContrast,
    "dvae": DiscreteVaeTraining,
    "classification": Classification,
}


def task_of(recipe: Recipe, out: Path) -> Task[Any]:
    """Return the recipe's task for the output folder `out`. Raises UsageError for a task that is not known."""
    if recipe.task not in TASKS:
        raise UsageError(f"task: {recipe.task} is not known; expected one of {', '.join(TASKS)}")
    return TASKS[recipe.task](recipe, out)


def task_for(command: str, recipe: Recipe, out: Path) -> Task[Any]:
    """Return the recipe's task. Raises UsageError when another command trains it."""
    task = task_of(recipe, out)
    if task.command != command:
        raise UsageError(
            f"the recipe's task is {recipe.task}, and `mae-scale {command}` does not train that; "
            f"use `mae-scale {task.command}` for it"
        )
    return task
