"""The masked-autoencoder objective: reconstruct the removed patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from data_pipeline.rng import generator
from mae_scale.engines.base import Objective
from mae_scale.models.drop_path import draw_branch_scales
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.masking import mask_noise
from mae_scale.models.vit import patchify

if TYPE_CHECKING:
    from data_pipeline.batches import Batch
    from mae_scale.tasks.words import WordSource


class Reconstruct(Objective):
    """Mean squared error over the removed patches (He et al., section 3), or the cross-entropy of their words.

    `words` is no part of the module: it is neither trained, nor sharded, nor stored.
    """

    def __init__(self, model: MaskedAutoencoder, *, seed: int, words: WordSource | None = None):
        """words: gives the words of a batch, where they are predicted."""
        super().__init__()
        self.model = model
        self.seed, self.words = seed, words
        self.never_decayed = {name.rpartition(".")[2] for name in model.no_weight_decay()}

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks, encoder then decoder: what is compiled, checkpointed and sharded."""
        return self.model.blocks

    def draw(self, step: int, positions: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return mask noise [B, L] and, with drop path, branch scales [B, depth, 2]; float32 on the host.

        Pure functions of (seed, step, position in the global batch); the loader calls this in its own thread.
        """
        noise, rates = self.noise("mask", step, positions), self.model.encoder.drop_path_rates
        if not any(rates):
            return (noise,)
        return noise, draw_branch_scales(rates, seed=self.seed, step=step, positions=positions)

    def tensors(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Return images [B, 3, H, W] and what draw() has drawn for them, float32, and where words are predicted these,
        int64 [B, L]; on the device."""
        return self.arguments(batch, batch.drawn, device)

    def arguments(
        self, batch: Batch, drawn: tuple[torch.Tensor, ...], device: torch.device
    ) -> tuple[torch.Tensor, ...]:
        """Return the arguments of forward() for the images of a batch, and noise, ... drawn for them."""
        words = () if self.words is None else (self.words.of(batch, device),)
        return (*(tensor.to(device, non_blocking=True) for tensor in (batch.images, *drawn)), *words)

    def noise(self, stream: str, step: int, positions: np.ndarray) -> torch.Tensor:
        """Return mask noise [B, L] float32 on the host for positions in the global batch of a step."""
        model = self.model
        scores = mask_noise(
            model.masking,
            grid_size=model.grid,
            mask_ratio=model.mask_ratio,
            generator_of=lambda position: generator(self.seed, stream, step, position),
            positions=positions,
        )
        return torch.from_numpy(scores)

    def forward(
        self, images: torch.Tensor, noise: torch.Tensor | None = None, *others: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """images [B, 3, H, W], noise [B, L] -> the loss, [] float32.

        others: with drop path, branch scales [B, depth, 2]; then, where words are predicted, these, int64 [B, L].
        In evaluation mode: each image's loss [B], the mask [B, L] (1: removed), and the prediction as pixels
        [B, L, p*p*3] unless words are predicted, all float32; without noise the encoder's features of whole images, the
        mean of their patches' tokens [B, D].
        """
        if noise is None:
            return self.model.forward_features(images)[:, 1:].mean(dim=1)
        words = others[-1] if self.model.predicts_words else None
        scales = others[: len(others) - self.model.predicts_words]
        output = self.model(images, noise, *(scales or (None,)), words)
        if self.training:
            return output.loss
        if self.model.predicts_words:
            return output.loss_per_image, output.mask
        patches = patchify(images, self.model.patch_size)
        return output.loss_per_image, output.mask, self.model.target.to_pixels(output.prediction, patches)
