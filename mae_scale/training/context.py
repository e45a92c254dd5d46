"""The context of a training run: all that its stages share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.batch_layout import BatchLayout
from data_pipeline.index import Index
from mae_scale.checkpoints.save import Saver
from mae_scale.config.schema import Recipe
from mae_scale.distributed.heartbeat import Control
from mae_scale.distributed.ranks import Ranks
from mae_scale.training.event_log import Events
from mae_scale.training.schedule import Steps, learning_rate, momentum, steps_of


@dataclass(frozen=True)
class RunContext:
    """The recipe, the output folder, this rank and what all stages of a run share."""

    recipe: Recipe
    out: Path
    ranks: Ranks
    device: torch.device
    layout: BatchLayout
    index: Index
    facts: dict[str, Any]
    """Facts about the run that each checkpoint's manifest holds."""
    training_flops: int
    """FLOPs per image, forward and backward."""
    peak_flops_per_s: float | None
    """Peak rate of the device in the run's precision; None where unknown."""
    control: Control
    saver: Saver
    events: Events

    @property
    def steps(self) -> Steps:
        return steps_of(self.recipe, len(self.index))

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def evaluation_is_due(self, done: int) -> bool:
        """Return whether data.val_root is to be measured after update `done`."""
        return (
            done % (self.recipe.tracking.evaluate_every_epochs * self.steps.per_epoch) == 0 or done == self.steps.total
        )

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of update number `step`, from 0."""
        return learning_rate(
            step, peak_lr=self.recipe.lr, steps_per_epoch=self.steps.per_epoch, schedule=self.recipe.schedule
        )

    def momentum(self, step: int) -> float | None:
        """Return the momentum encoder's decay at update number `step`, from 0; None where the task has none."""
        section = self.recipe.moco
        return None if section is None else momentum(step, start=section.momentum, total=self.steps.total)
