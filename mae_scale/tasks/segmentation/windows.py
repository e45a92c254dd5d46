"""Predict an image that is larger than what the model was trained on, by windows that overlap."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from data_pipeline.errors import UsageError


def starts_of(length: int, window: int, stride: int) -> list[int]:
    """Return where windows begin along a side: every `stride` px, the last one at the side's end (mmsegmentation's)."""
    if window < 1 or not 1 <= stride <= window:
        raise UsageError(f"windows of {window} px every {stride} px; expected a stride of 1 to the window's side")
    return sorted({min(start, max(0, length - window)) for start in range(0, max(1, length - window + stride), stride)})


def number_of_windows(height: int, width: int, *, window: int, stride: int) -> int:
    """Return how many windows an image of height x width px has."""
    return len(starts_of(height, window, stride)) * len(starts_of(width, window, stride))


def by_windows(
    model: Callable[[Tensor], Tensor], images: Tensor, *, window: int, stride: int, calls: int = 0
) -> Tensor:
    """Return logits [B, C, H, W] of images [B, 3, H, W]: the mean over the windows that hold a pixel.

    `model` returns logits [B, C, window, window] of [B, 3, window, window]. An image that is smaller than a window is
    filled up with zeros, below and to the right, for the model alone. Where the images have fewer windows than `calls`,
    the model is called that often all the same, as ranks that share its weights need it.
    """
    height, width = images.shape[-2:]
    below, beside = max(0, window - height), max(0, window - width)
    images = torch.nn.functional.pad(images, (0, beside, 0, below))
    total, count = None, images.new_zeros(1, 1, *images.shape[-2:])
    for y in starts_of(images.shape[-2], window, stride):
        for x in starts_of(images.shape[-1], window, stride):
            place = (..., slice(y, y + window), slice(x, x + window))
            logits = model(images[place])
            if total is None:
                total = logits.new_zeros(len(images), logits.shape[1], *images.shape[-2:])
            total[place] += logits
            count[place] += 1
    for _ in range(number_of_windows(*images.shape[-2:], window=window, stride=stride), calls):
        model(images[..., :window, :window])
    assert total is not None
    return (total / count)[..., :height, :width]
