"""The words of a batch's images: from the frozen tokeniser, on the fly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.errors import UsageError
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from mae_scale.config.schema import Recipe
from mae_scale.models.tokeniser import STRIDE, Tokeniser, TokeniserSize
from mae_scale.models.weights.tokeniser import read_tokeniser

if TYPE_CHECKING:
    from data_pipeline.batches import Batch

CHUNK = 32
"""Images that the tokeniser takes at once: its first layers need 50 MB for each."""


class WordSource(Protocol):
    """Gives the words of images."""

    words: int
    """Number of different words."""

    def of(self, batch: Batch, images: Tensor) -> Tensor:
        """Return the words int64 [B, L] of a batch, on the device of its images [B, 3, S, S] there."""


class TokenisedWords:
    """The words that a tokeniser finds, in float32 whatever the model's precision; it follows the images' device."""

    def __init__(self, tokeniser: Tokeniser, grid: int):
        self.words = tokeniser.size.words
        self._tokeniser, self._side = tokeniser, grid * STRIDE

    def of(self, batch: Batch, images: Tensor) -> Tensor:
        """Return the words int64 [B, L] of a batch's images [B, 3, S, S], which are on the device."""
        if self._tokeniser.blocks.input.weight.device != images.device:
            self._tokeniser.to(images.device)
        views = smaller_view(images, self._side)
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._tokeniser.tokens(part) for part in views.split(CHUNK)])


def smaller_view(images: Tensor, side: int) -> Tensor:
    """Return normalised images [B, 3, S, S] as the tokeniser takes them: [B, 3, side, side], values from 0 to 1."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = images.float() * std + mean
    if pixels.shape[-1] != side:
        pixels = functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return pixels.clamp(0, 1)


def tokeniser_of(recipe: Recipe) -> Tokeniser:
    """Return the recipe's tokeniser, frozen, on the host; raise UsageError as `read_tokeniser`."""
    assert recipe.tokeniser.weights is not None  # `check_words`
    return read_tokeniser(recipe.tokeniser.weights)


def words_of(recipe: Recipe) -> int:
    """Return the number of words of the recipe's tokeniser; of the published one where it names none, for planning."""
    path = recipe.tokeniser.weights
    return TokeniserSize().words if path is None or not path.exists() else tokeniser_of(recipe).size.words


def check_words(recipe: Recipe) -> None:
    """Raise UsageError when the recipe predicts words and does not say where they come from."""
    if recipe.model.target != "tokens":
        return
    path = recipe.tokeniser.weights
    if path is None:
        raise UsageError(
            "model.target=tokens needs a tokeniser; add tokeniser.weights=FILE (FlavaImageCodebook's weights, or "
            "DALL-E's encoder.pkl), or predict pixels by model.target=normalised_pixels"
        )
    if not Path(path).is_file():
        raise UsageError(f"tokeniser.weights={path} is not a file; give the weights of a tokeniser")
