"""The loss and the use of words on data.val_root while a dVAE is trained."""

import math

import torch

from data_pipeline.index import load_index
from mae_scale.engines.base import Engine
from mae_scale.models.tokeniser import from_normalised
from mae_scale.training.context import RunContext
from mae_scale.training.evaluation_loader import BATCH_SIZE, evaluation_loader
from mae_scale.training.inputs import VALIDATION


class WordValidation:
    """An evaluator, every tracking.evaluate_every_epochs and at the end of the schedule, through most probable words.

    val/loss: the negative evidence lower bound per pixel value, at the schedule's last weight of the divergence.
    val/mse: mean squared error of the pictures, pixels from 0 to 1. val/words_used: share of the vocabulary that some
    image has. val/perplexity: the exponential of the entropy of the words' frequencies, at most the number of words.
    Functions of the weights alone, as of an autoencoder's val/loss (tasks.mae.validation).
    """

    def __init__(self, context: RunContext, engine: Engine, *, words: int):
        root = context.recipe.data.val_root
        assert root is not None
        self._context, self._engine, self._words = context, engine, words
        self._index = load_index(context.out / VALIDATION, root)

    def due(self, done: int) -> bool:
        return self._context.evaluation_is_due(done)

    def __call__(self, done: int) -> dict[str, float]:
        context, device = self._context, self._context.device
        of_images = torch.zeros(3, len(self._index), dtype=torch.float64)  # loss, squared error, whether it was read
        counts = torch.zeros(self._words, dtype=torch.float64)
        with (
            torch.compiler.set_stance("force_eager"),
            evaluation_loader(context.recipe, self._index, context.ranks, batch_size=BATCH_SIZE) as loader,
        ):
            for batch in loader:
                images = batch.images.to(device, non_blocking=True)
                losses, words, pictures = self._engine.predict(images)
                errors = (pictures - from_normalised(images)).square().mean(dim=(1, 2, 3))
                valid = torch.from_numpy(batch.valid)
                found = torch.stack([losses, errors, torch.ones_like(losses)]).cpu()[:, valid].double()
                of_images[:, torch.from_numpy(batch.sample_ids[batch.valid])] = found
                counts += torch.bincount(words.cpu()[valid].flatten(), minlength=self._words)
        sums = torch.cat([of_images.flatten(), counts]).to(device)
        torch.distributed.all_reduce(sums)  # each image is on one rank: nothing is rounded
        losses, errors, read = (row.tolist() for row in sums[: of_images.numel()].cpu().view(of_images.shape))
        images = sum(read)
        if not images:
            return {name: math.nan for name in ("val/loss", "val/mse", "val/words_used", "val/perplexity")}
        counts = sums[of_images.numel() :].cpu()
        shares = counts / counts.sum()
        return {
            "val/loss": math.fsum(losses) / images,
            "val/mse": math.fsum(errors) / images,
            "val/words_used": float((counts > 0).double().mean()),
            "val/perplexity": float(torch.special.entr(shares).sum().exp()),
        }
