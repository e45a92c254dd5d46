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


class Reconstruct(Objective):
    """Mean squared error over the removed patches (He et al., section 3)."""

    def __init__(self, model: MaskedAutoencoder, *, seed: int):
        super().__init__()
        self.model = model
        self.seed = seed
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
        """Return images [B, 3, H, W] and what draw() has drawn for them, float32 on the device."""
        return tuple(tensor.to(device, non_blocking=True) for tensor in (batch.images, *batch.drawn))

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
        self, images: torch.Tensor, noise: torch.Tensor | None = None, branch_scales: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """images [B, 3, H, W], noise [B, L], branch_scales [B, depth, 2] -> the loss, [] float32.

        In evaluation mode: each image's loss [B], the mask [B, L] (1: removed), and the prediction as pixels
        [B, L, p*p*3], all float32; without noise the encoder's features of whole images, the mean of their patches'
        tokens [B, D].
        """
        if noise is None:
            return self.model.forward_features(images)[:, 1:].mean(dim=1)
        output = self.model(images, noise, branch_scales)
        if self.training:
            return output.loss
        patches = patchify(images, self.model.patch_size)
        return output.loss_per_image, output.mask, self.model.target.to_pixels(output.prediction, patches)
