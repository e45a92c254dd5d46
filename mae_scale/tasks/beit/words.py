"""The words of a batch's images: from the frozen tokeniser, on the fly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.errors import UsageError
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from mae_scale.checkpoints.shards import digest_of
from mae_scale.config.schema import Recipe
from mae_scale.models.build import size_of
from mae_scale.models.tokeniser import STRIDE, Tokeniser, TokeniserSize
from mae_scale.models.vit import grid_of
from mae_scale.models.weights.tokeniser import read_tokeniser
from mae_scale.training.inputs import recorded

if TYPE_CHECKING:
    from data_pipeline.batches import Batch

TOKENISER = "tokeniser"
"""The fact of a checkpoint's manifest about the tokeniser: its number of words, and its file's digest."""
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


def source_of(recipe: Recipe) -> WordSource:
    """Return what gives a recipe's words; raise UsageError as `check_words` and `read_tokeniser`."""
    check_words(recipe)
    path = recipe.tokenisation.weights
    assert path is not None  # check_words
    return TokenisedWords(read_tokeniser(path), grid_of(recipe.model.image_size, size_of(recipe.model).patch_size))


def words_of(recipe: Recipe) -> int:
    """Return the number of words of the recipe's tokeniser; of the published one where its file is not there."""
    path = recipe.tokeniser.weights if recipe.tokeniser else None
    return read_tokeniser(path).size.words if path is not None and path.is_file() else TokeniserSize().words


def check_words(recipe: Recipe) -> None:
    """Raise UsageError when the recipe predicts words and does not say where they come from."""
    path = recipe.tokeniser.weights if recipe.tokeniser else None
    if path is None:
        raise UsageError(
            "model.target=tokens needs a tokeniser; add tokeniser.weights=FILE (FlavaImageCodebook's weights, or "
            "DALL-E's encoder.pkl), or predict pixels: model.target=normalised_pixels"
        )
    if not path.is_file():
        raise UsageError(f"tokeniser.weights={path} is not a file; give the weights of a tokeniser")


def refuse_other_tokeniser(recipe: Recipe, out: Path) -> None:
    """Raise UsageError when the run in `out` was begun with a tokeniser of other content."""
    known = recorded(out, TOKENISER)
    path = recipe.tokenisation.weights
    assert path is not None  # check_words
    if known is None:
        return
    found = digest_of(path)
    if found != known["sha256"]:
        raise UsageError(
            f"tokeniser.weights={path} is another tokeniser than the run in {out} was begun with (sha256 {found[:12]}, "
            f"expected {known['sha256'][:12]}); give that one, or choose another --out"
        )
