"""Measuring a classifier on an evaluation set: every image once, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from data_pipeline.index import Index
from mae_scale.config.schema import Recipe
from mae_scale.distributed.ranks import Ranks
from mae_scale.tasks.classification.accuracy import NO_PREDICTION, Accuracy
from mae_scale.tasks.classification.datasets import EvaluationSet
from mae_scale.training.evaluation_loader import evaluation_loader

CONFUSIONS_SHOWN = 3


def measure(
    predict: Callable[[torch.Tensor], torch.Tensor],
    one: EvaluationSet,
    recipe: Recipe,
    *,
    classes: int,
    ranks: Ranks,
    device: torch.device,
) -> Accuracy:
    """Return the counts over all ranks. predict takes images [B, 3, S, S] on the device and gives logits [B, classes].

    All ranks call it, and each calls predict equally often.
    """
    accuracy = Accuracy(classes)
    class_of = torch.from_numpy(one.class_of)
    with evaluation_loader(recipe, one.index, ranks, kind=one.augmentation) as loader:
        for batch in loader:
            logits = predict(batch.images.to(device, non_blocking=True))
            accuracy.update(logits, class_of[batch.labels.cpu()], batch.valid, one.candidates)
    accuracy.reduce()
    return accuracy


def report(accuracy: Accuracy, names: list[str] | None, index: Index) -> dict[str, Any]:
    """Return the results as JSON holds them, with each class's accuracy and its most frequent confusions.

    `left_out` is the number of images that could not be read and are not counted.
    """
    names = names or [str(number) for number in range(accuracy.num_classes)]
    taken: dict[int, list[tuple[int, int]]] = {}
    for (true, predicted), count in accuracy.pairs.items():
        if predicted not in (true, NO_PREDICTION):
            taken.setdefault(true, []).append((count, predicted))
    per_class = []
    for number, images, top1 in accuracy.per_class():
        most = sorted(taken.get(number, []), key=lambda pair: (-pair[0], pair[1]))[:CONFUSIONS_SHOWN]
        confused = {names[predicted]: count for count, predicted in most}
        per_class.append({"class": names[number], "images": images, "top1": top1, "taken_for": confused})
    results = accuracy.results()
    loss = results["loss"] if math.isfinite(results["loss"]) else None  # JSON has no NaN
    left_out = len(index) + len(index.bad) - accuracy.images
    return {**results, "loss": loss, "left_out": left_out, "per_class": per_class}
