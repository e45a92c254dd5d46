"""The classification objective: cross-entropy with soft targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mae_scale.engines.base import Objective
from mae_scale.models.classifier import Classifier
from mae_scale.models.drop_path import draw_branch_scales
from mae_scale.tasks.classification.mixing import draw_mix, mix_images, soft_targets

if TYPE_CHECKING:
    from data_pipeline.batches import Batch
    from mae_scale.config.task_sections import ClassifierSection


class Classify(Objective):
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
        """Return the layer, from 0, of one of the objective's parameters."""
        return self.model.layer_of(name.removeprefix("model."))

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with their neighbours."""
        return bool(self.section.mixup or self.section.cutmix)

    def draw(self, step: int, positions: np.ndarray) -> tuple[Tensor, ...]:
        """Return shares [B] float32 and boxes [B, 4] int64 (see Mix) where images are mixed, then, with drop path,
        branch scales [B, depth, 2] float32; on the host.

        Pure functions of (seed, step, position in the global batch); the loader calls this in its own thread.
        """
        section, rates = self.section, self.model.encoder.drop_path_rates
        drawn = []
        if self.mixes:
            mix = draw_mix(
                mixup=section.mixup,
                cutmix=section.cutmix,
                image_size=self.model.image_size,
                seed=self.seed,
                step=step,
                positions=positions,
            )
            drawn += [torch.from_numpy(mix.share), torch.from_numpy(mix.box)]
        if any(rates):
            scales = draw_branch_scales(rates, seed=self.seed, step=step, positions=positions)
            scales[:, : self.model.frozen_blocks] = 1  # what is not trained is as in evaluation
            if self.model.trained_blocks and self.model.trained_blocks % 1:
                scales[:, self.model.frozen_blocks, 0] = 1
            drawn.append(scales)
        return tuple(drawn)

    def tensors(self, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
        """Return images [B, 3, H, W], targets [B, C] and, with drop path, branch scales [B, depth, 2]; float32 on the
        device."""
        images, labels, *drawn = (
            tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.labels, *batch.drawn)
        )
        share = None
        if self.mixes:
            share, box, *drawn = drawn
            images = mix_images(images, share, box)
        targets = soft_targets(labels, self.model.classes, label_smoothing=self.section.label_smoothing, share=share)
        return images, targets, *drawn

    def forward(self, images: Tensor, targets: Tensor | None = None, branch_scales: Tensor | None = None) -> Tensor:
        """images [B, 3, H, W], targets [B, C] -> the mean cross-entropy, [] float32; without targets logits [B, C]."""
        logits = self.model(images, branch_scales)
        if targets is None:
            return logits
        return -(targets * logits.float().log_softmax(dim=1)).sum(dim=1).mean()
