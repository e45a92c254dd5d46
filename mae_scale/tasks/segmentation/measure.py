"""Measuring a segmenter: every labelled pixel of the stored images once, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.annotations.placing import Placing
from data_pipeline.arrays import Uint8Array
from data_pipeline.index import Index
from data_pipeline.plan import BatchPlan
from mae_scale.config.schema import Recipe
from mae_scale.distributed.ranks import Ranks
from mae_scale.tasks.row_placing import placing_of
from mae_scale.tasks.segmentation.label_files import LabelFiles
from mae_scale.tasks.segmentation.pixel_counts import PixelCounts
from mae_scale.tasks.segmentation.windows import by_windows, number_of_windows
from mae_scale.training.evaluation_loader import evaluation_loader

Predict = Callable[[Tensor], Tensor]
"""Images [B, 3, S, S] to logits [B, C, S, S]."""
Take = Callable[[int, Uint8Array], None]
"""Takes an image's number and its predicted classes, uint8 [H, W]."""


class Labelled(NamedTuple):
    """An image of an evaluation: where its pixels are put, and its labels uint8 [H, W] as stored."""

    placing: Placing
    labels: Uint8Array


def measure(
    predict: Predict,
    index: Index,
    labels: LabelFiles,
    recipe: Recipe,
    *,
    classes: int,
    ranks: Ranks,
    device: torch.device,
    take: Take | None = None,
) -> PixelCounts:
    """Return the counts over all ranks, of all labelled pixels of the stored images; as segmentation.evaluation says.

    Logits are resized (bilinear) to the stored image before the likeliest class is taken. All ranks call it, and each
    calls predict equally often. `take` is called with each of this rank's predictions.
    """
    counts, side, section = PixelCounts(classes), recipe.model.square_side, recipe.segmenting
    sliding = section.evaluation == "sliding"
    stride = section.stride or max(1, side * 2 // 3)

    def labelled(row: BatchPlan) -> Labelled:
        return Labelled(placing_of(row), labels.read(int(row.sample_ids[0])))

    loader = evaluation_loader(
        recipe,
        index,
        ranks,
        kind="evaluation_unbounded" if sliding else "evaluation_fit",
        batch_size=1 if sliding else recipe.engine.micro_batch or 1,
        annotate=labelled,
    )
    with loader:
        for batch in loader:
            images = batch.images.to(device, non_blocking=True)
            if sliding:
                calls = _most(number_of_windows(*images.shape[-2:], window=side, stride=stride), device)
                logits = by_windows(predict, images, window=side, stride=stride, calls=calls)
            else:
                logits = predict(images)
            rows = zip(batch.sample_ids.tolist(), batch.valid.tolist(), batch.annotated, logits, strict=True)
            for image, valid, (placing, truth), its in rows:
                if not valid:
                    continue
                height, width = placing.filled
                its = functional.interpolate(
                    its[None, :, :height, :width].float(), size=truth.shape, mode="bilinear", align_corners=False
                )
                predicted = its.argmax(dim=1)
                counts.update(predicted, torch.from_numpy(truth)[None])
                if take is not None:
                    take(image, predicted[0].cpu().numpy().astype(np.uint8))
    counts.reduce()
    return counts


def report(counts: PixelCounts, names: list[str], index: Index) -> dict[str, Any]:
    """Return the results as JSON holds them, with each class's intersection over union and its share of the pixels.

    `left_out` is the number of images that could not be read and are not counted.
    """
    there = counts.pixels.sum(1).tolist()
    total = max(1, sum(there))
    per_class = [
        {"class": name, "iou": _finite(iou), "share": 100 * pixels / total}
        for name, iou, pixels in zip(names, counts.per_class(), there, strict=True)
    ]
    numbers = {name: _finite(value) for name, value in counts.results().items()}
    left_out = len(index) + len(index.bad) - counts.images
    return {**numbers, "images": counts.images, "left_out": left_out, "per_class": per_class}


def _most(number: int, device: torch.device) -> int:
    """Return the largest of the ranks' numbers."""
    if not torch.distributed.is_initialized():
        return number
    most = torch.tensor(number, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN
