"""Counting an evaluation: top-1, top-5, the mean cross-entropy and which classes are taken for which, exactly.

Counts are whole numbers on the host, so that any number of ranks gives the same. The confusion matrix is kept as
the (true, predicted) pairs that occur: an evaluation of n images has at most n of them, where iNaturalist 2018's
8,142 classes would need 530 MB on every rank for a matrix that is nearly all zeros.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mae_scale.distributed.collectives import from_all

TOP = 5
NO_PREDICTION = -1


class Accuracy:
    """The counts of one evaluation set.

    `pairs` counts images by (true class, predicted class), where NO_PREDICTION stands for a row of logits that is
    not finite; `top5_hits` counts images whose true class is among the five likeliest (all of them with five
    classes or fewer); `loss_sum` is the sum of the cross-entropies in nats, float64.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.pairs: Counter[tuple[int, int]] = Counter()
        self.top5_hits = 0
        self.loss_sum = 0.0

    @property
    def images(self) -> int:
        return self.pairs.total()

    @torch.no_grad()
    def update(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        valid: np.ndarray | torch.Tensor,
        candidates: np.ndarray | torch.Tensor | None = None,
    ) -> None:
        """Count a batch: logits [B, C] of any float dtype, labels int64 [B], valid bool [B]; any device.

        Rows that are not valid are left out. With `candidates` int64 [K] only these classes compete, for the
        accuracies and in the softmax of the loss (the published protocol of ImageNet-A and -R). Of equal logits
        the lower class is the likelier one. A row that is not finite is wrong, and makes the mean loss NaN.
        Raises ValueError for logits of another shape, or a label that is no class or does not compete.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits are {list(logits.shape)}, expected [B, {self.num_classes}]")
        device = logits.device
        valid = torch.as_tensor(valid, device=device)
        logits, labels = logits[valid].double(), labels.to(device)[valid]
        competing = torch.ones(self.num_classes, dtype=torch.bool, device=device)
        if candidates is not None:
            competing.zero_()[torch.as_tensor(candidates, device=device)] = True
        self._check(labels, competing)
        finite = logits.isfinite().all(1)
        logits = logits.masked_fill(~competing, -math.inf)

        of_label = logits.gather(1, labels[:, None])
        lower = torch.arange(self.num_classes, device=device) < labels[:, None]
        rank = ((logits > of_label) | ((logits == of_label) & lower)).sum(1)  # how many classes are likelier
        predicted = logits.argmax(1)  # the first of equals
        predicted[~finite] = NO_PREDICTION
        losses = logits.logsumexp(1) - of_label[:, 0]
        losses[~finite] = math.nan

        self.pairs.update(zip(labels.tolist(), predicted.tolist(), strict=True))
        self.top5_hits += int((finite & (rank < TOP)).sum())
        self.loss_sum += float(losses.sum())

    def _check(self, labels: torch.Tensor, competing: torch.Tensor) -> None:
        strange = (labels < 0) | (labels >= self.num_classes)
        if strange.any():
            raise ValueError(f"label {labels[strange][0].item()} is none of the classes 0 to {self.num_classes - 1}")
        left_out = ~competing[labels]
        if left_out.any():
            raise ValueError(f"label {labels[left_out][0].item()} is none of the classes that compete")

    def reduce(self) -> None:
        """Sum the counts over all ranks, so that each has the totals; to be called by all, once, at the end.

        Every rank adds in the order of the ranks, and has the same loss to the last bit.
        """
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return
        parts = from_all(lambda: (dict(self.pairs), self.top5_hits, self.loss_sum))
        self.pairs, self.top5_hits, self.loss_sum = Counter(), 0, 0.0
        for pairs, top5_hits, loss_sum in parts:
            self.pairs.update(pairs)
            self.top5_hits += top5_hits
            self.loss_sum += loss_sum

    def results(self) -> dict[str, Any]:
        """Return top1 and top5 (percent), loss (nats, mean), images; non_finite: how many had no finite logits.

        Percentages and loss are NaN when no image was counted.
        """
        images = self.images
        top1_hits = sum(count for (true, predicted), count in self.pairs.items() if true == predicted)
        non_finite = sum(count for (_, predicted), count in self.pairs.items() if predicted == NO_PREDICTION)
        return {
            "top1": _percent(top1_hits, images),
            "top5": _percent(self.top5_hits, images),
            "loss": self.loss_sum / images if images else math.nan,
            "images": images,
            "non_finite": non_finite,
        }

    def per_class(self) -> list[tuple[int, int, float]]:
        """Return (class, its images, top-1 percent) of the classes that had images, by class."""
        images: Counter[int] = Counter()
        for (true, _), count in self.pairs.items():
            images[true] += count
        return [(true, images[true], _percent(self.pairs[true, true], images[true])) for true in sorted(images)]

    def confusion(self) -> np.ndarray:
        """Return int64 [C, C]: images by true class (rows) and predicted class; without those that are not finite."""
        matrix = np.zeros((self.num_classes, self.num_classes), np.int64)
        for (true, predicted), count in self.pairs.items():
            if predicted != NO_PREDICTION:
                matrix[true, predicted] = count
        return matrix


def _percent(hits: int, images: int) -> float:
    return 100 * hits / images if images else math.nan
