"""The masked-autoencoder objective: reconstruct the removed patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from data_pipeline.order import generator
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.masking import mask_noise

if TYPE_CHECKING:
    from data_pipeline.loader import Batch


class Reconstruct(nn.Module):
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

    def tensors(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """images [B, 3, H, W] and mask noise [B, L], float32 on the device.

        The noise is a pure function of (seed, step, position in the global batch).
        """
        noise = self.noise("mask", batch.step, batch.positions)
        if device.type == "cuda":
            noise = noise.pin_memory()
        return batch.images.to(device, non_blocking=True), noise.to(device, non_blocking=True)

    def noise(self, stream: str, step: int, positions: np.ndarray) -> torch.Tensor:
        """Mask noise [B, L] float32 on the host for positions of the global batch of a step."""
        model = self.model
        scores = mask_noise(
            model.masking,
            grid_size=model.grid,
            mask_ratio=model.mask_ratio,
            generator_of=lambda position: generator(self.seed, stream, step, position),
            positions=positions,
        )
        return torch.from_numpy(scores)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] and noise [B, L] -> the loss, [] float32."""
        return self.model(images, noise)["loss"]
