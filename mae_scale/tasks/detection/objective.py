"""The detection objective: Mask R-CNN's five losses, summed, mean over the images."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.rng import generator
from mae_scale.models.detector import Instances, MaskRcnn
from mae_scale.models.drop_path import draw_branch_scales
from mae_scale.tasks.dense_transfer import DenseObjective

if TYPE_CHECKING:
    from data_pipeline.annotations.placing import PlacedObjects
    from data_pipeline.batches import Batch


class SeenObjects(NamedTuple):
    """What an image shows after its crop: (height, width) of what it fills of the square, and its objects."""

    filled: tuple[int, int]
    objects: PlacedObjects


class DetectObjects(DenseObjective):
    """Mask R-CNN's losses of objectness, proposals, classes, boxes and masks (He et al., arXiv 1703.06870)."""

    model: MaskRcnn

    def __init__(self, model: MaskRcnn, *, seed: int):
        super().__init__()
        self.model, self.seed = model, seed

    def draw(self, step: int, positions: np.ndarray) -> tuple[Tensor, ...]:
        """Return seeds of the samples int64 [B] and, with drop path, branch scales float32 [B, depth, 2], on the host.

        Pure functions of (seed, step, position in the global batch).
        """
        seeds = [int(generator(self.seed, "sampled_boxes", step, int(p)).integers(2**63)) for p in positions]
        drawn = [torch.tensor(seeds, dtype=torch.int64)]
        if any(rates := self.encoder.drop_path_rates):
            drawn.append(draw_branch_scales(rates, seed=self.seed, step=step, positions=positions))
        return tuple(drawn)

    def tensors(self, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
        """Return images float32 [B, 3, S, S], boxes float32 [n, 4], labels int64 [n] and masks uint8 [n, S, S] of all
        their objects, and branch scales (empty without), on the device; sizes [B, 2], counts [B] and seeds [B], int64
        on the host.

        Of n objects the first are the first image's. Labels begin with 1.
        """
        seen: tuple[SeenObjects, ...] = batch.annotated
        objects = [one.objects for one in seen]
        seeds, *scales = batch.drawn
        boxes, labels, masks = (
            np.concatenate([getattr(one, name) for one in objects]) for name in ("boxes", "category", "masks")
        )
        on_device = (
            torch.as_tensor(column).to(device, non_blocking=True)
            for column in (batch.images, boxes, labels.astype(np.int64) + 1, masks, *scales)
        )
        images, *rest = on_device
        sizes = torch.tensor([one.filled for one in seen])
        counts = torch.tensor([len(one.boxes) for one in objects])
        return images, sizes, counts, seeds, *rest

    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        counts: Tensor | None = None,
        seeds: Tensor | None = None,
        boxes: Tensor | None = None,
        labels: Tensor | None = None,
        masks: Tensor | None = None,
        branch_scales: Tensor | None = None,
    ) -> Tensor | list[dict[str, Tensor]]:
        """Return the mean loss, [] float32, of what `tensors` gives; of images and sizes alone each one's detections
        (`MaskRcnn.detect`)."""
        filled = [(height, width) for height, width in sizes.tolist()]
        if counts is None or seeds is None or boxes is None or labels is None or masks is None:
            return self.model.detect(images, filled)
        of_images = zip(*(column.split(counts.tolist()) for column in (boxes, labels, masks)), strict=True)
        objects = [Instances(*columns) for columns in of_images]
        losses = self.model.losses(images, filled, objects, seeds, branch_scales)
        return torch.stack(list(losses.values())).sum(0).mean()
