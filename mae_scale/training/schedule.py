"""The number of steps, and the learning rate of each."""

import math
from typing import NamedTuple

from data_pipeline.errors import UsageError
from data_pipeline.plan import steps_per_epoch
from mae_scale.config.schema import Recipe
from mae_scale.config.sections import ScheduleSection


class Steps(NamedTuple):
    """Numbers of updates."""

    per_epoch: int
    total: int
    """Updates of the whole schedule."""
    last: int
    """The update after which a start ends."""


def steps_of(recipe: Recipe, images: int) -> Steps:
    """Return the numbers of updates of a recipe on `images` images. Raises UsageError for less than one batch."""
    try:
        per_epoch = steps_per_epoch(images, recipe.data.global_batch)
    except UsageError as error:
        for key in ("fraction", "labels_per_class"):
            if (value := getattr(recipe.data, key)) is not None:
                raise UsageError(f"{error} (data.{key}={value} chooses them; data.{key}=null takes all)") from None
        raise
    total = recipe.schedule.epochs * per_epoch
    return Steps(per_epoch, total, min(total, recipe.schedule.stop_after_steps or total))


TENTH = 0.1


def learning_rate(step: int, *, peak_lr: float, steps_per_epoch: int, schedule: ScheduleSection) -> float:
    """Return the rate of update `step` (from 0): linear warm-up, then the schedule's shape.

    With e = step / steps_per_epoch: peak * e / warmup_epochs while e < warmup_epochs. Then, with the share
    s = (e - warmup_epochs) / (epochs - warmup_epochs), cosine: peak * (1 + cos(pi * s)) / 2 (He et al., table 8);
    linear: peak * (1 - s) (the polynomial of power 1 of semantic segmentation, which mmsegmentation begins at e = 0);
    steps: peak * 0.1 ^ (number of step_epochs that e has reached) (Li et al., arXiv 2203.16527, appendix A.2).
    """
    epoch, warmup = step / steps_per_epoch, schedule.warmup_epochs
    if epoch < warmup:
        return peak_lr * epoch / warmup
    if schedule.shape == "steps":
        return peak_lr * TENTH ** sum(epoch >= begin for begin in schedule.step_epochs)
    if schedule.shape == "linear":
        return peak_lr * (schedule.epochs - epoch) / (schedule.epochs - warmup)
    return peak_lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (schedule.epochs - warmup)))


def momentum(step: int, *, start: float, total: int) -> float:
    """Return the momentum encoder's decay at update `step` (from 0) of `total`: from `start` to 1 by half a cosine.

    1 - (1 - start) * (1 + cos(pi * step / total)) / 2, as in the authors' release of MoCo v3.
    """
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / total))
