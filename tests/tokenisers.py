"""Tokenisers of random weights, whose words differ from image to image and from patch to patch."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mae_scale.models.tokeniser import Tokeniser, TokeniserSize


def tiny_tokeniser(images: Tensor, words: int, seed: int = 0) -> Tokeniser:
    """A tokeniser for which each word is as likely as another, on average over images [n, 3, S, S] of 0 to 1.

    As torch initialises it, it gives one word for everything: a test with that cannot tell whose words it has.
    """
    torch.manual_seed(seed)
    model = Tokeniser(TokeniserSize(width=8, words=words, blocks_per_group=1)).requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    model.blocks.output.conv.bias -= model(images).mean(dim=(0, 2, 3))
    found = model.tokens(images)
    assert largest_share(found) < 0.6
    for moved in (found.roll(1, dims=0), found.roll(1, dims=1)):
        assert (moved != found).float().mean() > 0.3
    return model


def tokeniser_file(path: Path, digits: Path, words: int, seed: int = 0) -> Path:
    """Write a tokeniser for the digits."""
    save_file(tiny_tokeniser(pixels_of(digits), words, seed).state_dict(), path)
    return path


def pixels_of(digits: Path) -> Tensor:
    """Every sixth validation image of the digits as it is stored: float32 [60, 3, 32, 32] of 0 to 1."""
    files = sorted((digits / "val").glob("*/*.jpg"))[::6]
    images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255


def largest_share(words: Tensor) -> float:
    """The most frequent word's share."""
    return words.flatten().bincount().max().item() / words.numel()
