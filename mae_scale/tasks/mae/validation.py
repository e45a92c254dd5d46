"""The reconstruction loss on data.val_root while a masked autoencoder is trained."""

import torch

from data_pipeline.augment.kinds import SecondView
from data_pipeline.batches import Batch
from mae_scale.engines.base import Engine
from mae_scale.tasks.mae.objective import Reconstruct
from mae_scale.tasks.validation_loss import ValidationLoss
from mae_scale.training.context import RunContext


def reconstruction_loss(
    context: RunContext, engine: Engine, objective: Reconstruct, second: SecondView | None
) -> ValidationLoss:
    """Return the evaluator of val/loss: the mean over the images of each one's mean loss over its removed patches.

    second: the view that words are found in. An image's mask is a function of the recipe's seed and of the image.
    """

    def losses_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        noise = objective.noise("validation_mask", 0, batch.sample_ids)
        found, *_ = engine.predict(*objective.arguments(batch, (noise,), context.device))
        return found, torch.ones_like(found)

    return ValidationLoss(context, losses_of, second)
