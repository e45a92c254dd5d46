"""The reconstruction loss on data.val_root while a masked autoencoder is trained."""

import math

import torch

from data_pipeline.index import load_index
from mae_scale.engines.base import Engine
from mae_scale.tasks.mae.objective import Reconstruct
from mae_scale.training.context import RunContext
from mae_scale.training.evaluation_loader import BATCH_SIZE, evaluation_loader
from mae_scale.training.inputs import VALIDATION


class ValidationLoss:
    """An evaluator: val/loss every tracking.evaluate_every_epochs and at the end of the schedule.

    The mean over the validation images of each one's mean loss over its removed patches, cut as in evaluation. An
    image's mask is a function of the recipe's seed and of the image. A function of the weights alone, to the last digit
    on one kind of device: batches have the same images for any number of ranks and any engine.micro_batch, blocks are
    not compiled, and each image's loss is added exactly.
    """

    def __init__(self, context: RunContext, engine: Engine, objective: Reconstruct):
        root = context.recipe.data.val_root
        assert root is not None
        self._context, self._engine, self._objective = context, engine, objective
        self._index = load_index(context.out / VALIDATION, root)

    def due(self, done: int) -> bool:
        return self._context.evaluation_is_due(done)

    def __call__(self, done: int) -> dict[str, float]:
        return {"val/loss": self._loss()}

    def _loss(self) -> float:
        """Return the mean over all images that can be read; NaN without one."""
        context, device = self._context, self._context.device
        losses = torch.zeros(len(self._index), dtype=torch.float64)
        counted = torch.zeros(len(self._index), dtype=torch.float64)
        with (
            torch.compiler.set_stance("force_eager"),
            evaluation_loader(context.recipe, self._index, context.ranks, batch_size=BATCH_SIZE) as loader,
        ):
            for batch in loader:
                noise = self._objective.noise("validation_mask", 0, batch.sample_ids)
                found, _, _ = self._engine.predict(
                    batch.images.to(device, non_blocking=True), noise.to(device, non_blocking=True)
                )
                rows = torch.from_numpy(batch.sample_ids[batch.valid])
                losses[rows] = found.cpu()[torch.from_numpy(batch.valid)].double()
                counted[rows] = 1
        both = torch.stack([losses, counted]).to(device)
        torch.distributed.all_reduce(both)  # each image is on one rank: nothing is rounded
        values, count = both[0].tolist(), int(both[1].sum())
        return math.fsum(values) / count if count else math.nan
