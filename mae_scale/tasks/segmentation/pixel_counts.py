"""Counting pixels by class and prediction: intersection over union of the whole set, never averaged over images.

Counts are whole numbers, so that any number of ranks and any batch size give the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.annotations.label_maps import IGNORED
from mae_scale.distributed.collectives import from_all


class PixelCounts:
    """`pixels` int64 [C, C] on the host: labelled pixels by class (rows) and predicted class, of `images` images."""

    def __init__(self, classes: int):
        self.pixels = torch.zeros(classes, classes, dtype=torch.int64)
        self.images = 0

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Count images: predicted classes int64 [B, H, W] and labels of any whole type [B, H, W], IGNORED left out.

        Raises ValueError for a label that is no class.
        """
        classes = len(self.pixels)
        self.images += len(labels)
        labels = labels.to(predicted.device).long()
        counted = labels != IGNORED
        labels, predicted = labels[counted], predicted[counted]
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"labels are {int(labels.min())} to {int(labels.max())}, of {classes} classes")
        self.pixels += torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes).cpu()

    def reduce(self) -> None:
        """Sum the counts over all ranks, so that each has the totals; to be called by all, once, at the end."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            parts = from_all(lambda: (self.pixels, self.images))
            self.pixels = torch.stack([pixels for pixels, _ in parts]).sum(0)
            self.images = sum(images for _, images in parts)

    def per_class(self) -> list[float]:
        """Return each class's intersection over union in percent; NaN for a class that is neither there nor found."""
        hits = self.pixels.diagonal()
        union = self.pixels.sum(0) + self.pixels.sum(1) - hits
        return [100 * hit / all_ if all_ else math.nan for hit, all_ in zip(hits.tolist(), union.tolist(), strict=True)]

    def results(self) -> dict[str, Any]:
        """Return mean_iou over the classes that are there or found, mean_accuracy over those that are there, and
        pixel_accuracy, in percent, and the number of labelled pixels; NaN when there was none."""
        there = self.pixels.sum(1)
        hits, total = self.pixels.diagonal(), int(there.sum())
        shares = [100 * hit / all_ for hit, all_ in zip(hits.tolist(), there.tolist(), strict=True) if all_]
        return {
            "mean_iou": _mean([value for value in self.per_class() if not math.isnan(value)]),
            "mean_accuracy": _mean(shares),
            "pixel_accuracy": 100 * int(hits.sum()) / total if total else math.nan,
            "pixels": total,
        }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
