"""The loss on data.val_root while BEiT is trained."""

import torch

from data_pipeline.augment.kinds import SecondView
from data_pipeline.batches import Batch
from mae_scale.engines.base import Engine
from mae_scale.tasks.beit.objective import PredictRemoved
from mae_scale.tasks.validation_loss import ValidationLoss
from mae_scale.training.context import RunContext


def removed_patch_loss(
    context: RunContext, engine: Engine, objective: PredictRemoved, second: SecondView | None
) -> ValidationLoss:
    """Return the evaluator of val/loss: the mean over the removed patches of all images.

    second: the view that words are found in. An image's mask is a function of the recipe's seed and of the image.
    """

    def losses_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        masks = torch.from_numpy(objective.masks("validation_mask", 0, batch.sample_ids))
        losses, counts = engine.predict(*objective.arguments(batch, (masks, torch.ones(len(masks))), context.device))
        return losses, counts

    return ValidationLoss(context, losses_of, second)
