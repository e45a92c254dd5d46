"""Measuring a detector: every image once, over all ranks, then COCO's average precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data_pipeline.annotations.placing import Placing
from data_pipeline.plan import BatchPlan
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import from_all, from_first
from mae_scale.distributed.ranks import Ranks
from mae_scale.tasks.detection.average_precision import average_precision, results_of
from mae_scale.tasks.detection.evaluation_set import DetectionSet
from mae_scale.training.evaluation_loader import evaluation_loader

Detect = Callable[[Tensor, Tensor], list[dict[str, Tensor]]]
"""Images [B, 3, S, S] and what they fill int64 [B, 2] (height, width) to each one's detections (MaskRcnn.detect)."""


def placing_of(row: BatchPlan) -> Placing:
    """Return where a one-row plan puts its image's pixels."""
    return Placing.of(row.regions[0], row.filled[0], int(row.flips[0]))


def detections(
    predict: Detect, one: DetectionSet, recipe: Recipe, *, ranks: Ranks, device: torch.device
) -> list[dict[str, Any]]:
    """Return the detections in all images in COCO's format of results, in the images' order, on all ranks.

    All ranks call it, and each calls predict equally often. Boxes and masks are of the stored images.
    """
    found: list[tuple[int, list[dict[str, Any]]]] = []
    index, batch_size = one.index, recipe.engine.micro_batch or 1
    with evaluation_loader(
        recipe, index, ranks, kind="evaluation_fit", batch_size=batch_size, annotate=placing_of
    ) as loader:
        for batch in loader:
            images = batch.images.to(device, non_blocking=True)
            seen = predict(images, torch.tensor([placing.filled for placing in batch.annotated]))
            rows = zip(batch.sample_ids.tolist(), batch.valid.tolist(), batch.annotated, seen, strict=True)
            for image, valid, placing, its in rows:
                if valid:
                    size = int(index.height[image]), int(index.width[image])
                    scale = (1 / placing.scale).tolist()
                    its_id = one.image_ids[image]
                    found.append((image, results_of(its_id, its, scale=scale, size=size, ids=one.category_ids)))
    gathered = [pair for part in from_all(lambda: found) for pair in part]
    return [result for _, its in sorted(gathered, key=lambda pair: pair[0]) for result in its]


def measure(results: list[dict[str, Any]], one: DetectionSet) -> dict[str, Any]:
    """Return {"box": measures, "mask": measures, "images": n} in percent, the same on all ranks. All call it.

    A measure for which there is no object is None.
    """

    def work() -> dict[str, Any]:
        kinds = {"box": "bbox", "mask": "segm"}
        measures = {
            name: average_precision(one.annotations, results, kind, left_out=one.left_out)  # type: ignore[arg-type]
            for name, kind in kinds.items()
        }
        found = {name: {k: v if math.isfinite(v) else None for k, v in own.items()} for name, own in measures.items()}
        return {**found, "images": len(one.index), "detections": len(results)}

    return from_first(work)
