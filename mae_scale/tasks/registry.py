"""The tasks, by the name that a recipe's `task:` gives. A new task is a folder beside this file and one line here."""

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from data_pipeline.errors import UsageError
from mae_scale.config.schema import Recipe
from mae_scale.tasks.beit.task import BeitPretraining
from mae_scale.tasks.classification.task import Classification
from mae_scale.tasks.detection.task import Detection
from mae_scale.tasks.dvae.task import DiscreteVaeTraining
from mae_scale.tasks.evaluation import Asked
from mae_scale.tasks.mae.task import MaskedAutoencoding
from mae_scale.tasks.moco.task import MomentumContrast
from mae_scale.tasks.segmentation.task import Segmentation
from mae_scale.training.task import Task

TASKS: dict[str, type[Task[Any]]] = {
    "mae": MaskedAutoencoding,
    "beit": BeitPretraining,
    "moco": MomentumContrast,
    "dvae": DiscreteVaeTraining,
    "classification": Classification,
    "detection": Detection,
    "segmentation": Segmentation,
}


EVALUATIONS = {
    "classification": "mae_scale.tasks.classification.evaluate",
    "detection": "mae_scale.tasks.detection.evaluate",
    "segmentation": "mae_scale.tasks.segmentation.evaluate",
}
"""Of the tasks that `mae-scale evaluate` measures: the module that does it, an Evaluation."""


class Evaluation(Protocol):
    """Measures a trained model on data.val_root."""

    def check(self, recipe: Recipe, asked: Asked) -> None:
        """Raise UsageError for what can be refused before a rank is started."""

    def evaluate(self, recipe: Recipe, asked: Asked) -> dict[str, Any] | None:
        """Return the results on rank 0, else None; write what is asked for. All ranks call it."""

    def describe(self, recipe: Recipe, results: dict[str, Any]) -> str:
        """Return human-readable lines."""


def evaluation_of(recipe: Recipe) -> Evaluation:
    """Return what measures a recipe's task. Raises UsageError when nothing does."""
    if recipe.task not in EVALUATIONS:
        raise UsageError(
            f"the recipe's task is {recipe.task}, expected {', '.join(EVALUATIONS)}; give one of finetune/..., "
            "probe/..., detection/..., segmentation/..., or a run's recipe"
        )
    return cast(Evaluation, import_module(EVALUATIONS[recipe.task]))


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
