"""Mixup and cutmix of neighbours in the global batch, and the smoothed targets of the mixed images.

Sources: mixup, Zhang et al., arXiv 1710.09412; cutmix, Yun et al., arXiv 1905.04899; label smoothing, Szegedy et al.,
arXiv 1512.00567. As timm's `Mixup(mode="pair", switch_prob=0.5)` mixes, with one difference: an image's partner is its
neighbour (positions 2j and 2j + 1) and not the one at the other end of the batch, so that both are on one rank, in one
micro-batch. The order of the images is random anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.image_size import ImageSize, height_and_width
from data_pipeline.rng import generator


@dataclass(frozen=True)
class Mix:
    """How n images are mixed with their neighbours.

    `share` float32 [n] is what an image keeps of its label, and with mixup of its pixels; `box` int64 [n, 4] (y0, y1,
    x0, x1) is what cutmix takes from the neighbour, empty with mixup.
    """

    share: np.ndarray
    box: np.ndarray


def draw_mix(*, mixup: float, cutmix: float, image_size: ImageSize, seed: int, step: int, positions: np.ndarray) -> Mix:
    """Return the mix of images at `positions` int [n] of the global batch of a step, in pairs; one alpha is not 0.

    A pure function of (seed, step, position). With both alphas each pair is cut or mixed with equal chance; the share
    is Beta(alpha, alpha), and with cutmix 1 - (area of the clipped box) / (area of the image).
    """
    height, width = height_and_width(image_size)
    share = np.ones(len(positions), np.float32)
    box = np.zeros((len(positions), 4), np.int64)
    for row in range(0, len(positions), 2):
        random = generator(seed, "mix", step, int(positions[row]) // 2)
        cut = bool(cutmix) and (not mixup or random.random() < 0.5)
        alpha = cutmix if cut else mixup
        kept = random.beta(alpha, alpha)
        if cut:
            half = [int(side * np.sqrt(1 - kept)) // 2 for side in (height, width)]
            y, x = random.integers(0, height), random.integers(0, width)
            edges = np.clip([y - half[0], y + half[0]], 0, height), np.clip([x - half[1], x + half[1]], 0, width)
            box[row : row + 2] = np.concatenate(edges)
            kept = 1 - np.ptp(edges[0]) * np.ptp(edges[1]) / (height * width)
        share[row : row + 2] = kept
    return Mix(share, box)


def mix_images(images: Tensor, share: Tensor, box: Tensor) -> Tensor:
    """Mix images [n, 3, H, W] of neighbours in pairs -> mixed images, of the same shape, dtype and device.

    share [n] and box [n, 4] of a Mix, on that device; no host waits for it.
    """
    partners = _neighbours(images)
    y, x = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    y0, y1, x0, x1 = box[:, :, None].unbind(1)  # each [n, 1]
    rows, columns = (y >= y0) & (y < y1), (x >= x0) & (x < x1)  # [n, H], [n, W]
    inside = rows[:, None, :, None] & columns[:, None, None, :]  # [n, 1, H, W]
    weight = torch.where(box[:, 1] > box[:, 0], 1, share)[:, None, None, None]  # what is cut is not mixed too
    return torch.where(inside, partners, images * weight + partners * (1 - weight))


def soft_targets(labels: Tensor, classes: int, *, label_smoothing: float, share: Tensor | None) -> Tensor:
    """Map labels int64 [n] -> float32 [n, classes], rows summing to 1: smoothed, and shared with the neighbour's label.

    share [n] of a Mix, on the labels' device; None: nothing is mixed.
    """
    off = label_smoothing / classes
    targets = torch.full((len(labels), classes), off, device=labels.device)
    targets.scatter_(1, labels[:, None], 1 - label_smoothing + off)
    if share is None:
        return targets
    share = share[:, None]
    return targets * share + _neighbours(targets) * (1 - share)


def _neighbours(rows: Tensor) -> Tensor:
    """Return [n, ...] with rows 2j and 2j + 1 exchanged."""
    return rows.reshape(-1, 2, *rows.shape[1:]).flip(1).flatten(0, 1)
