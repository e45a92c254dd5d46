"""The loss on data.val_root in pre-training by masked images."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from data_pipeline.augment.kinds import SecondView
from data_pipeline.batches import Batch
from data_pipeline.index import load_index
from mae_scale.training.context import RunContext
from mae_scale.training.evaluation_loader import BATCH_SIZE, evaluation_loader
from mae_scale.training.inputs import VALIDATION


class ValidationLoss:
    """An evaluator: val/loss every tracking.evaluate_every_epochs and at the end of the schedule.

    The mean over the validation images, cut as in evaluation, of what `losses_of` gives. A function of the weights
    alone, to the last digit on one kind of device: batches have the same images for any number of ranks and any
    engine.micro_batch, blocks are not compiled, and each image's loss is added exactly.
    """

    def __init__(
        self, context: RunContext, losses_of: Callable[[Batch], tuple[Tensor, Tensor]], second: SecondView | None = None
    ):
        """losses_of: from a batch to each image's sum of losses, and the number of losses in it, both float [n].

        second: the view that it needs beside the images.
        """
        root = context.recipe.data.val_root
        assert root is not None
        self._context, self._losses_of, self._second = context, losses_of, second
        self._index = load_index(context.out / VALIDATION, root)

    def due(self, done: int) -> bool:
        return self._context.evaluation_is_due(done)

    def __call__(self, done: int) -> dict[str, float]:
        return {"val/loss": self._loss()}

    def _loss(self) -> float:
        """Return the mean over all images that can be read; NaN without one."""
        context = self._context
        losses = torch.zeros(len(self._index), dtype=torch.float64)
        counted = torch.zeros(len(self._index), dtype=torch.float64)
        with (
            torch.compiler.set_stance("force_eager"),
            evaluation_loader(
                context.recipe, self._index, context.ranks, batch_size=BATCH_SIZE, second=self._second
            ) as loader,
        ):
            for batch in loader:
                valid, rows = torch.from_numpy(batch.valid), torch.from_numpy(batch.sample_ids[batch.valid])
                for kept, found in zip((losses, counted), self._losses_of(batch), strict=True):
                    kept[rows] = found.cpu()[valid].double()
        both = torch.stack([losses, counted]).to(context.device)
        torch.distributed.all_reduce(both)  # each image is on one rank: nothing is rounded
        values, count = both[0].tolist(), int(both[1].sum())
        return math.fsum(values) / count if count else math.nan
