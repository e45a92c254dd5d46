"""The rotation objective: tell by how many quarter turns an image was turned (Gidaris et al., arXiv 1803.07728)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from data_pipeline.rng import generator
from mae_scale.engines.base import Objective
from mae_scale.models.vit import Encoder, ViTSize, patchify

if TYPE_CHECKING:
    from data_pipeline.batches import Batch

TURNS = 4


class PredictRotation(Objective):
    """Cross-entropy of a linear head on the mean of the patch tokens."""

    def __init__(self, size: ViTSize, image_size: int, *, seed: int):
        super().__init__()
        self.encoder = Encoder(size, image_size=image_size)
        self.head = nn.Linear(size.width, TURNS)
        self.seed = seed
        self.never_decayed = {"cls_token"}

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks: what is compiled, checkpointed and sharded."""
        return list(self.encoder.blocks)

    def draw(self, step: int, positions: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return quarter turns int64 [B], a pure function of (seed, step, position in the global batch)."""
        draws = [generator(self.seed, "rotation", step, int(position)).random() for position in positions]
        return (torch.tensor(draws).mul(TURNS).long(),)

    def tensors(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Return images [B, 3, S, S] float32 and their quarter turns, on the device."""
        return tuple(tensor.to(device, non_blocking=True) for tensor in (batch.images, *batch.drawn))

    def forward(self, images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Map images [B, 3, S, S], turns int64 [B] -> the loss, [] float32."""
        every = torch.stack([images.rot90(turn, (2, 3)) for turn in range(TURNS)])  # [4, B, 3, S, S]
        turned = every[turns, torch.arange(len(images), device=images.device)]  # [B, 3, S, S]
        tokens = self.encoder(patchify(turned, self.encoder.size.patch_size))  # [B, 1 + L, D]
        logits = self.head(tokens[:, 1:].mean(dim=1))  # [B, 4]
        return functional.cross_entropy(logits.float(), turns)
