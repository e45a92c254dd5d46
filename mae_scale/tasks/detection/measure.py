"""Measuring a detector: every image once, over all ranks, then COCO's average precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import from_all, from_first
from mae_scale.distributed.ranks import Ranks
from mae_scale.tasks.detection.average_precision import average_precision, results_of, truth_of
from mae_scale.tasks.detection.evaluation_set import DetectionSet
from mae_scale.tasks.row_placing import placing_of
from mae_scale.training.evaluation_loader import evaluation_loader

Detect = Callable[[Tensor, Tensor], list[dict[str, Tensor]]]
"""Images [B, 3, S, S] and what they fill int64 [B, 2] (height, width) to each one's detections (MaskRcnn.detect)."""


@dataclass(frozen=True)
class Detections:
    """What was found in the images that could be read: COCO's results in the images' order, and the images' ids."""

    results: list[dict[str, Any]]
    image_ids: list[int]


def detections(predict: Detect, one: DetectionSet, recipe: Recipe, *, ranks: Ranks, device: torch.device) -> Detections:
    """Return the detections in all images, on all ranks; boxes and masks are of the stored images.

    All ranks call it, and each calls predict equally often.
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
    gathered = sorted((pair for part in from_all(lambda: found) for pair in part), key=lambda pair: pair[0])
    return Detections(
        [result for _, its in gathered for result in its], [one.image_ids[image] for image, _ in gathered]
    )


def measure(seen: Detections, one: DetectionSet) -> dict[str, Any]:
    """Return {"box": measures, "mask": measures, "images": n, "left_out": n, "detections": n}, the same on all ranks.

    Measures are in percent, None where there is no object. left_out: images that could not be read, and do not count.
    All ranks call it.
    """

    def work() -> dict[str, Any]:
        kinds: dict[str, Literal["bbox", "segm"]] = {"box": "bbox", "mask": "segm"}
        truth = truth_of(one.annotations, images=set(seen.image_ids), left_out=one.left_out)
        measures = {name: average_precision(truth, seen.results, kind) for name, kind in kinds.items()}
        found = {name: {k: v if math.isfinite(v) else None for k, v in own.items()} for name, own in measures.items()}
        measured = len(seen.image_ids)
        left_out = len(one.index) + len(one.index.bad) - measured
        return {**found, "images": measured, "left_out": left_out, "detections": len(seen.results)}

    return from_first(work)
