"""The segmentation objective: the cross-entropy of each pixel's class, of UperNet's head and the auxiliary one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mae_scale.models.drop_path import draw_branch_scales
from mae_scale.tasks.dense_transfer import DenseObjective

if TYPE_CHECKING:
    from data_pipeline.batches import Batch
    from mae_scale.models.segmenter import Segmenter


class LabelPixels(DenseObjective):
    """Cross-entropy per pixel, the auxiliary head's with weight 0.4, mean over all pixels of the global batch."""

    model: Segmenter

    def __init__(self, model: Segmenter, *, seed: int):
        super().__init__()
        self.model, self.seed = model, seed

    def draw(self, step: int, positions: np.ndarray) -> tuple[Tensor, ...]:
        """Return with drop path branch scales float32 [B, depth, 2], on the host; see draw_branch_scales."""
        rates = self.encoder.drop_path_rates
        return (draw_branch_scales(rates, seed=self.seed, step=step, positions=positions),) if any(rates) else ()

    def tensors(self, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
        """Return images float32 [B, 3, S, S], labels uint8 [B, S, S] and, with drop path, branch scales, on the
        device."""
        labels = torch.from_numpy(np.stack(batch.annotated))
        return tuple(tensor.to(device, non_blocking=True) for tensor in (batch.images, labels, *batch.drawn))

    def forward(self, images: Tensor, labels: Tensor | None = None, branch_scales: Tensor | None = None) -> Tensor:
        """images [B, 3, S, S], labels [B, S, S] -> the mean loss, [] float32; without labels logits [B, C, S, S]."""
        from mae_scale.models.segmenter import AUXILIARY_WEIGHT, pixel_losses

        if labels is None:
            return self.model.logits(images)
        labels = labels.long()
        logits, auxiliary = self.model(images, branch_scales)
        return (pixel_losses(logits, labels) + AUXILIARY_WEIGHT * pixel_losses(auxiliary, labels)).mean()
