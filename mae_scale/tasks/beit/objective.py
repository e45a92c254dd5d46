"""BEiT's objective: predict the words, or the pixels, of removed patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.rng import generator
from mae_scale.engines.base import Objective
from mae_scale.models.beit import Beit
from mae_scale.models.drop_path import draw_branch_scales
from mae_scale.models.masking import block_masks, kept_patches, mask_noise

if TYPE_CHECKING:
    from data_pipeline.batches import Batch
    from mae_scale.tasks.words import WordSource


class PredictRemoved(Objective):
    """The mean loss over the removed patches of the whole global batch (Bao et al., equation 2).

    Images have different numbers of removed patches. Masks are a function of seed, step and position, so each rank
    draws those of the whole global batch, and knows their number: a patch weighs the same whatever micro-batch its
    image is in. `words` is no part of the module: it is neither trained, nor sharded, nor stored.
    """

    # As in the authors' code: the mask token and the table of biases are decayed.
    never_decayed = frozenset(("cls_token",))

    def __init__(self, model: Beit, words: WordSource | None, *, seed: int, global_batch: int):
        """words: gives the words of a batch; None where pixels are predicted, or only the masks are asked for."""
        super().__init__()
        self.model = model
        self.words, self.seed, self.global_batch = words, seed, global_batch
        self._drawn: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=bool))  # the last step, its masks

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks: what is compiled, checkpointed and sharded."""
        return list(self.model.encoder.blocks)

    def draw(self, step: int, positions: np.ndarray) -> tuple[Tensor, ...]:
        """Return masks bool [B, L], weights float32 [B] and, with drop path, branch scales float32 [B, depth, 2].

        A weight is the images of the global batch for each of its removed patches. On the host; pure functions of
        (seed, step, position in the global batch); the loader calls this in its own thread.
        """
        if self._drawn[0] != step:
            self._drawn = step, self.masks("mask", step, np.arange(self.global_batch))
        whole = self._drawn[1]
        weight = self.global_batch / max(1, int(whole.sum()))
        drawn = [torch.from_numpy(whole[positions]), torch.full((len(positions),), weight)]
        rates = self.model.encoder.drop_path_rates
        if any(rates):
            drawn.append(draw_branch_scales(rates, seed=self.seed, step=step, positions=positions))
        return tuple(drawn)

    def masks(self, stream: str, step: int, positions: np.ndarray) -> np.ndarray:
        """Return masks bool [B, L], True for a removed patch, for positions int [B] in the global batch of a step."""
        model = self.model
        if model.masking == "block":
            return block_masks(
                grid_size=model.grid,
                removed=model.removed,
                generator_of=lambda group: generator(self.seed, stream, step, group),
                positions=positions,
            )
        noise = mask_noise(
            model.masking,
            grid_size=model.grid,
            mask_ratio=model.mask_ratio,
            generator_of=lambda position: generator(self.seed, stream, step, position),
            positions=positions,
        )
        removed = noise.argsort(axis=1, kind="stable")[:, kept_patches(model.patches, model.mask_ratio) :]
        masks = np.zeros(noise.shape, dtype=bool)
        np.put_along_axis(masks, removed, True, axis=1)
        return masks

    def tensors(self, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
        """Return images [B, 3, H, W], then what draw() has drawn, with the words int64 [B, L] after the weights where
        words are predicted; on the device."""
        return self.arguments(batch, batch.drawn, device)

    def arguments(self, batch: Batch, drawn: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
        """Return the arguments of forward() for the images of a batch, and masks, weights, ... drawn for them."""
        images, mask, weight, *scales = (t.to(device, non_blocking=True) for t in (batch.images, *drawn))
        words = [] if self.words is None else [self.words.of(batch, device)]
        return images, mask, weight, *words, *scales

    def forward(
        self, images: Tensor, mask: Tensor | None = None, weight: Tensor | None = None, *others: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """images [B, 3, H, W], mask [B, L], weight [B] -> the micro-batch's part of the loss, [] float32.

        others: words int64 [B, L] where words are predicted, then, with drop path, branch scales [B, depth, 2].
        In evaluation mode each image's sum of losses and number of removed patches, [B] float32; without a mask the
        encoder's features of whole images, the mean of their patches' tokens [B, D].
        """
        if mask is None or weight is None:
            return self.model.features(images)[:, 1:].mean(dim=1)
        words, scales = (others[:1], others[1:]) if self.model.predicts_words else ((), others)
        losses, _ = self.model(images, mask, *(words or (None,)), *scales)  # [B, R]
        if self.training:
            return (losses.sum(dim=1) * weight).mean()
        return losses.sum(dim=1), mask.sum(dim=1).float()
