"""The classification objective: cross-entropy with soft targets, for everything that comes after pre-training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mae_scale.models.classifier import Classifier
from mae_scale.models.drop_path import draw_branch_scales
from mae_scale.objectives.mixing import draw_mix, mix_images, soft_targets

if TYPE_CHECKING:
    from data_pipeline.loader import Batch
    from mae_scale.recipe import ClassifierSection


class Classify(nn.Module):
    """Cross-entropy of a classifier's logits; mixup, cutmix and label smoothing as the recipe says."""

    never_decayed = frozenset(("cls_token", "pos_embed"))

    def __init__(self, model: Classifier, section: ClassifierSection, *, seed: int):
        super().__init__()
        self.model = model
        self.section, self.seed = section, seed

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks: what is compiled, checkpointed and sharded."""
        return list(self.model.encoder.blocks)

    @property
    def layers(self) -> int:
        """Number of layers for layer-wise lr decay: the embedding, the blocks, and what comes after."""
        return len(self.blocks) + 2

    def layer_of(self, name: str) -> int:
        """The layer, from 0, of one of the objective's parameters."""
        return self.model.layer_of(name.removeprefix("model."))

    def tensors(self, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
        """images [B, 3, S, S], targets [B, C], with drop path branch scales [B, depth, 2]; float32 on the device.

        Mixing and scales are pure functions of (seed, step, position in the global batch).
        """
        section, encoder = self.section, self.model.encoder
        where = {"seed": self.seed, "step": batch.step, "positions": batch.positions}
        mix = draw_mix(mixup=section.mixup, cutmix=section.cutmix, image_size=self.model.image_size, **where)
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        if mix is not None:
            images = mix_images(images, mix)
        targets = soft_targets(labels, self.model.classes, label_smoothing=section.label_smoothing, mix=mix)
        if not any(encoder.drop_path_rates):
            return images, targets
        scales = draw_branch_scales(encoder.drop_path_rates, **where)
        scales[:, : self.model.frozen_blocks] = 1  # what is not trained is as in evaluation
        if self.model.trained_blocks and self.model.trained_blocks % 1:
            scales[:, self.model.frozen_blocks, 0] = 1
        return images, targets, scales.to(device, non_blocking=True)

    def forward(self, images: Tensor, targets: Tensor | None = None, branch_scales: Tensor | None = None) -> Tensor:
        """images [B, 3, S, S], targets [B, C] -> the mean cross-entropy, [] float32; without targets logits [B, C]."""
        logits = self.model(images, branch_scales)
        if targets is None:
            return logits
        return -(targets * logits.float().log_softmax(dim=1)).sum(dim=1).mean()
