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
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD

STRIDE = 8
"""Pixels per word, in each direction."""
GROUPS = 4
LOGIT_LAPLACE_EPS = 0.1
"""Pixels are mapped from 0..1 into eps..1 - eps (Ramesh et al., appendix A.3)."""


Kernels = tuple[int, int, int, int]
"""Sides in pixels of a block's convolutions."""


def from_normalised(images: Tensor) -> Tensor:
    """Return values from 0 to 1 of images [..., 3, H, W] that were normalised by ImageNet's mean and std."""
    # By numbers of the host, not by tensors: copying those to a GPU would wait for it.
    channels = zip(images.unbind(dim=-3), IMAGENET_STD, IMAGENET_MEAN, strict=True)
    return torch.stack([channel * std + mean for channel, std, mean in channels], dim=-3).clamp(0, 1)


def into_open_interval(pixels: Tensor) -> Tensor:
    """Return pixels of 0 to 1 mapped into eps to 1 - eps, where their logit is finite (Ramesh et al., appendix A.3)."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * pixels + LOGIT_LAPLACE_EPS


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
            pool = {"pool": nn.MaxPool2d(kernel_size=2)} if number < GROUPS else {}
            parts[f"group_{number}"] = Group(before, after, size.blocks_per_group, layers, (3, 3, 3, 1), **pool)
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
        return self.blocks(into_open_interval(images).to(next(self.parameters()).dtype))

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Return the most probable words, int64 [B, L], row by row, of images [B, 3, S, S] with values from 0 to 1."""
        return self(images).argmax(dim=1).flatten(1)


class Group(nn.Module):
    """Blocks at one resolution, then a change of it, such as `pool=nn.MaxPool2d(2)`."""

    def __init__(self, before: int, after: int, blocks: int, layers: int, kernels: Kernels, **change: nn.Module):
        super().__init__()
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for number in range(1, blocks + 1):
            parts[f"block_{number}"] = Block(before if number == 1 else after, after, layers, kernels)
        self.group = nn.Sequential(parts | change)

    def forward(self, x: Tensor) -> Tensor:
        return self.group(x)


class Block(nn.Module):
    """A residual block of four convolutions; of `layers` blocks each adds 1 / layers^2 of its own."""

    def __init__(self, before: int, after: int, layers: int, kernels: Kernels):
        super().__init__()
        self.gain = 1 / layers**2
        self.id_path = nn.Identity() if before == after else nn.Conv2d(before, after, kernel_size=1)
        self.res_path = _Path(before, after, kernels)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class _Path(nn.Module):
    def __init__(self, before: int, after: int, kernels: Kernels):
        super().__init__()
        inner = after // 4
        channels = pairwise((before, inner, inner, inner, after))
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for number, ((into, out), kernel) in enumerate(zip(channels, kernels, strict=True), start=1):
            parts[f"relu_{number}"] = nn.ReLU()
            parts[f"conv_{number}"] = nn.Conv2d(into, out, kernel_size=kernel, padding=kernel // 2)
        self.path = nn.Sequential(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.path(x)
