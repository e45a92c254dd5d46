"""The words of a batch's images: from the frozen tokeniser, on the fly, or from the disk."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from data_pipeline.augment.kinds import SecondView
from data_pipeline.errors import UsageError
from data_pipeline.index import Index
from mae_scale.checkpoints.tokeniser import open_tokeniser
from mae_scale.config.schema import Recipe
from mae_scale.models.build import size_of
from mae_scale.models.tokeniser import GROUPS, STRIDE, Tokeniser, TokeniserSize
from mae_scale.models.vit import grid_of
from mae_scale.models.weights.tokeniser import tokeniser_digest
from mae_scale.planning.workload import Workload
from mae_scale.tasks.tokens import StoredTokens, open_tokens
from mae_scale.training.inputs import recorded
from mae_scale.training.task import FROM_SCRATCH, Origin

if TYPE_CHECKING:
    from data_pipeline.batches import Batch

TOKENISER = "tokeniser"
"""The fact of a checkpoint's manifest about the tokeniser: its number of words, and its digest."""
CHUNK = 32
"""Images that the tokeniser takes at once: its first layers need 50 MB for each."""


class WordSource(Protocol):
    """Gives the words of images."""

    words: int
    """Number of different words."""

    digest: str
    """Digest of the tokeniser that gives them."""

    def of(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the words int64 [B, L] of a batch's images, on the device."""


class TokenisedWords:
    """The words that a tokeniser finds, in float32 whatever the model's precision; it follows the images' device."""

    def __init__(self, tokeniser: Tokeniser):
        self.words, self.digest = tokeniser.size.words, tokeniser_digest(tokeniser)
        self._tokeniser = tokeniser

    def of(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the words int64 [B, L] of a batch's second views [B, 3, 8 grid, 8 grid], on the device."""
        assert batch.second is not None  # `view_of` asks for it
        self._tokeniser.to(device)
        views = batch.second.to(device, non_blocking=True)
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with exact, torch.autocast(device.type, enabled=False):
            return torch.cat([self._tokeniser.tokens(part) for part in views.split(CHUNK)])


class StoredWords:
    """The words on the disk of the training images, and of no others."""

    def __init__(self, tokens: StoredTokens):
        self.words, self.digest = tokens.heading.words, tokens.heading.tokeniser
        self._tokens = tokens

    def of(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the words int64 [B, L] of a batch's images, on the device."""
        words = torch.from_numpy(self._tokens.rows(batch.sample_ids))
        return (words.pin_memory() if device.type == "cuda" else words).to(device, non_blocking=True)


def word_grid(recipe: Recipe) -> int:
    """Return the number of words along a side of an image. Raises UsageError for images that are not square."""
    return grid_of(recipe.model.square_side, size_of(recipe.model).patch_size)


def view_of(recipe: Recipe) -> SecondView:
    """Return the view that the tokeniser sees: the same crop, flip and colours, 8 px for each patch's side."""
    return SecondView(None, word_grid(recipe) * STRIDE, normalised=False)


def source_of(recipe: Recipe) -> WordSource:
    """Return what gives a recipe's words. Raises UsageError when there is no tokeniser, RunError when it is damaged."""
    return TokenisedWords(_opened(_path(recipe)))


def stored(recipe: Recipe, found: WordSource | None, index: Index) -> WordSource | None:
    """Return the source of the training images' words: of tokeniser.tokens, else the given one.

    Raises UsageError when those are not the words of these images.
    """
    path = tokens_of(recipe)
    if path is None or found is None:
        return found
    tokens = open_tokens(
        path,
        index,
        found.digest,
        word_grid(recipe),
        image_size=recipe.model.square_side,
        exif_orientation=recipe.data.exif_orientation,
    )
    return StoredWords(tokens)


def training_view(recipe: Recipe) -> SecondView | None:
    """Return the second view of training images that words are found in; None where they are on the disk."""
    return view_of(recipe) if tokens_of(recipe) is None else None


def tokens_of(recipe: Recipe) -> Path | None:
    """Return the folder of the training images' words; None where they are found while training."""
    return recipe.tokeniser.tokens if recipe.tokeniser else None


def _path(recipe: Recipe) -> Path:
    path = recipe.tokenisation.weights
    assert path is not None  # check_words
    return path


@cache
def _opened(path: Path) -> Tokeniser:
    return open_tokeniser(path)  # by the checks, the plan and the training: each would read the same 200 MB


def size_of_tokeniser(recipe: Recipe) -> TokeniserSize:
    """Return the size of the recipe's tokeniser; of the published one where its file is not there, for planning."""
    path = recipe.tokeniser.weights if recipe.tokeniser else None
    return _opened(path).size if path is not None and path.exists() else TokeniserSize()


def products_of(tokeniser: Tokeniser, side: int) -> tuple[tuple[int, int, int], ...]:
    """Return (positions per image, inner, outer) of the tokeniser's convolutions on views of `side` px."""
    found = []
    for name, layer in tokeniser.named_modules():
        if isinstance(layer, nn.Conv2d):
            group = re.search(r"group_(\d)\.", name)
            halvings = int(group[1]) - 1 if group else 0 if "input" in name else GROUPS - 1
            inner = layer.in_channels * layer.kernel_size[0] ** 2
            found.append(((side >> halvings) ** 2, inner, layer.out_channels))
    return tuple(found)


def bytes_of(tokeniser: Tokeniser, side: int) -> int:
    """Return the bytes of the tokeniser's weights, and of what its first group holds for CHUNK views of `side` px."""
    live = 4  # a block's input and sum, and what a convolution reads and writes
    return 4 * (sum(p.numel() for p in tokeniser.parameters()) + CHUNK * live * tokeniser.size.width * side**2)


def add_tokeniser(work: Workload, tokeniser: Tokeniser, grid: int) -> Workload:
    """Return a task's workload with that of the tokeniser, which finds the words of grid x grid patches per image."""
    products = tuple((*product, False) for product in products_of(tokeniser, grid * STRIDE))
    return replace(
        work,
        other_products=(*work.other_products, *products),
        buffer_bytes=work.buffer_bytes + bytes_of(tokeniser, grid * STRIDE),
    )


def origin_of(words: WordSource | None) -> Origin:
    """Return the facts about the words for each checkpoint's manifest."""
    if words is None:
        return FROM_SCRATCH
    return Origin([], {TOKENISER: {"words": words.words, "digest": words.digest}})


def check_words(recipe: Recipe) -> None:
    """Raise UsageError when the recipe predicts words and does not say where they come from, or wrongly.

    A tokeniser that cannot be read is refused here, before a job waits in a queue.
    """
    path = recipe.tokeniser.weights if recipe.tokeniser else None
    if path is None:
        raise UsageError(
            "model.target=tokens needs a tokeniser; add tokeniser.weights=PATH (a run of task dvae, weights of "
            "FlavaImageCodebook, or DALL-E's encoder.pkl), or predict pixels: model.target=normalised_pixels"
        )
    if not path.exists():
        raise UsageError(
            f"tokeniser.weights={path} does not exist; give the weights of a tokeniser, or a run of task dvae"
        )
    data, tokens = recipe.data, tokens_of(recipe)
    if tokens is not None and (data.augmentation != "none" or data.flip):
        raise UsageError(
            f"tokeniser.tokens={tokens} holds the words of centre crops, and data.augmentation={data.augmentation}"
            f"{f', data.flip={data.flip:g}' if data.flip else ''} trains on others; use data.augmentation=none without "
            "data.flip, or drop tokeniser.tokens: words are then found while training"
        )
    _opened(path)


def refuse_other_tokeniser(recipe: Recipe, words: WordSource, out: Path) -> None:
    """Raise UsageError when the run in `out` was begun with the words of another tokeniser."""
    known = (recorded(out, TOKENISER) or {}).get("digest", words.digest)
    if words.digest != known:
        raise UsageError(
            f"tokeniser.weights={_path(recipe)} is another tokeniser than the run in {out} was begun with (digest "
            f"{words.digest[:12]}, expected {known[:12]}); give that one, or choose another --out"
        )
