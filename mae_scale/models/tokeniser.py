"""The tokeniser whose words BEiT predicts: the encoder of a discrete variational autoencoder (arXiv 2102.12092).

Letters in shapes: B images, S their side in pixels, V words, L words per image. A word stands for 8 x 8 pixels: BEiT
takes the 14 x 14 words of a 112 px view for the patches of a 224 px one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from data_pipeline.errors import UsageError

STRIDE = 8
"""Pixels per word, in each direction."""
GROUPS = 4
LOGIT_LAPLACE_EPS = 0.1
"""Pixels are mapped from 0..1 into eps..1 - eps (Ramesh et al., appendix A.3)."""


@dataclass(frozen=True)
class TokeniserSize:
    """Sizes of a tokeniser; the defaults are the published one's."""

    width: int = 256
    words: int = 8192
    blocks_per_group: int = 2


class Tokeniser(nn.Module):
    """Encoder of images to words. Parameters have the names of transformers' FlavaImageCodebook."""

    def __init__(self, size: TokeniserSize = TokeniserSize()):
        super().__init__()
        self.size = size
        width, layers = size.width, GROUPS * size.blocks_per_group
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["input"] = nn.Conv2d(3, width, kernel_size=7, padding=3)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for number, (before, after) in enumerate(pairwise(widths), start=1):
            pools = number < GROUPS
            parts[f"group_{number}"] = _Group(before, after, size.blocks_per_group, layers, pools=pools)
        parts["output"] = nn.Sequential(
            OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(8 * width, size.words, kernel_size=1))
        )
        self.blocks = nn.Sequential(parts)

    def forward(self, images: Tensor) -> Tensor:
        """Return the words' logits [B, V, S/8, S/8] of images [B, 3, S, S] with values from 0 to 1.

        Raises UsageError for images whose side is not a multiple of 8.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % STRIDE or images.shape[3] % STRIDE:
            raise UsageError(
                f"images have shape {tuple(images.shape)}, a tokeniser takes [B, 3, S, S] with S a multiple of {STRIDE}"
            )
        return self.blocks((1 - 2 * LOGIT_LAPLACE_EPS) * images + LOGIT_LAPLACE_EPS)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Return the most probable words, int64 [B, L], row by row, of images [B, 3, S, S] with values from 0 to 1."""
        return self(images).argmax(dim=1).flatten(1)


class _Group(nn.Module):
    """Blocks at one resolution, then half of it."""

    def __init__(self, before: int, after: int, blocks: int, layers: int, *, pools: bool):
        super().__init__()
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(1, blocks + 1):
            parts[f"block_{number}"] = _Block(before if number == 1 else after, after, layers)
        if pools:
            parts["pool"] = nn.MaxPool2d(kernel_size=2)
        self.group = nn.Sequential(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.group(x)


class _Block(nn.Module):
    """A residual block of four convolutions; of `layers` blocks each adds 1 / layers^2 of its own."""

    def __init__(self, before: int, after: int, layers: int):
        super().__init__()
        self.gain = 1 / layers**2
        self.id_path = nn.Identity() if before == after else nn.Conv2d(before, after, kernel_size=1)
        self.res_path = _Path(before, after)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class _Path(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        inner = after // 4
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for number, (into, out, kernel) in enumerate(
            ((before, inner, 3), (inner, inner, 3), (inner, inner, 3), (inner, after, 1)), start=1
        ):
            parts[f"relu_{number}"] = nn.ReLU()
            parts[f"conv_{number}"] = nn.Conv2d(into, out, kernel_size=kernel, padding=kernel // 2)
        self.path = nn.Sequential(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.path(x)
