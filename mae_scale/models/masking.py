"""The choice of removed patches: random, block-wise and grid masking, as scores in NumPy.

The model keeps the patches with the smallest scores. Each image's scores depend on nothing but the generator
of its position in the global batch, so the same masks come out for any number of ranks and any micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from data_pipeline.errors import UsageError
from data_pipeline.image_size import ImageSize, height_and_width

KINDS = ("random", "block", "grid")

# BEiT (Bao et al., arXiv 2106.08254, algorithm 1): at least 16 of 14x14 patches per block, aspect ratio
# 0.3 to 1 / 0.3.
_SMALLEST_BLOCK = 16 / 14**2
_LOG_ASPECT = math.log(1 / 0.3)
_FAILURES = 10  # attempts in a row that place no block, after which the authors' generator leaves a mask as it is
_ATTEMPTS = 32  # drawn at once
_POSITIONS_PER_GENERATOR = 64  # making a generator takes as long as drawing for about as many


def kept_patches(patches: int, mask_ratio: float) -> int:
    """Return the number of an image's patches that stay visible, rounded down as in the authors' release.

    Raises UsageError when that leaves no visible or no removed patch.
    """
    kept = int(patches * (1 - mask_ratio))
    if not 0 < kept < patches:
        raise UsageError(
            f"mask_ratio {mask_ratio} leaves {kept} of {patches} patches visible: expected at least 1 and "
            f"at most {patches - 1}; choose a ratio between 0 and {1 - 1 / patches:.4g}"
        )
    return kept


def check_masking(kind: str, *, grid_size: ImageSize, mask_ratio: float) -> None:
    """Raise UsageError when there is no such kind, or it cannot remove that share of the grid's patches.

    grid_size: rows and columns of patches, or the number along both sides of a square.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown masking {kind!r}: expected one of {', '.join(KINDS)}")
    grid = height_and_width(grid_size)
    kept = kept_patches(math.prod(grid), mask_ratio)
    if kind == "grid" and _grid_step(grid, kept) is None:
        sides = range(2, min(grid) + 1)
        fits = [f"{1 - 1 / s**2:.6g}" for s in sides if grid[0] % s == 0 and grid[1] % s == 0]
        raise UsageError(
            f"grid masking cannot remove {mask_ratio:g} of {grid[0]} x {grid[1]} patches: it keeps one "
            f"patch of each s x s square, so mask_ratio may be {', '.join(fits) or 'nothing on this grid'}"
        )


def mask_noise(
    kind: str,
    *,
    grid_size: ImageSize,
    mask_ratio: float,
    generator_of: Callable[[int], np.random.Generator],
    positions: np.ndarray,
) -> np.ndarray:
    """Return scores float32 [len(positions), L] of a grid of L patches.

    The kept_patches(L, ratio) smallest stay visible.
    random: uniform numbers in [0, 1). block, grid: 0 for patches that stay, 1 for those removed.
    generator_of(position) is the generator of one image, named by its position in the global batch; it is
    asked once for each of the positions int [n], and not at all for grid masking, which draws nothing.
    Raises UsageError as `check_masking`.
    """
    check_masking(kind, grid_size=grid_size, mask_ratio=mask_ratio)
    grid = height_and_width(grid_size)
    patches = math.prod(grid)
    kept = kept_patches(patches, mask_ratio)
    noise = np.empty((len(positions), patches), dtype=np.float32)
    if kind == "grid":
        noise[:] = _grid_scores(grid, kept)
        return noise
    for row, position in zip(noise, positions, strict=True):
        generator = generator_of(int(position))
        if kind == "random":
            generator.random(dtype=np.float32, out=row)
        else:
            row[:] = _block_scores(generator, grid, patches - kept)
    return noise


def _grid_step(grid: tuple[int, int], kept: int) -> int | None:
    """Return the side s of the squares of which one patch is kept, or None when no square tiling keeps that many."""
    rows, columns = grid
    step = math.isqrt(rows * columns // kept)
    tiles = rows % step == 0 and columns % step == 0
    return step if tiles and (rows // step) * (columns // step) == kept else None


def _grid_scores(grid: tuple[int, int], kept: int) -> np.ndarray:
    """Return scores [L]: 0 at the upper left patch of each s x s square, 1 elsewhere."""
    step = _grid_step(grid, kept)
    scores = np.ones(grid, dtype=np.float32)
    scores[::step, ::step] = 0
    return scores.reshape(-1)


def _block_scores(generator: np.random.Generator, grid: tuple[int, int], removed: int) -> np.ndarray:
    """Return scores [L] with exactly `removed` ones, drawn as rectangles (BEiT, algorithm 1), the last cut short."""
    scores = np.zeros(grid, dtype=np.float32)
    smallest = max(1, round(_SMALLEST_BLOCK * math.prod(grid)))
    missing = removed
    while missing > 0:
        share, aspect, top, left = generator.random(4).tolist()
        area = smallest + share * max(0, missing - smallest)
        aspect = math.exp((2 * aspect - 1) * _LOG_ASPECT)
        height = min(grid[0], max(1, round(math.sqrt(area * aspect))))
        width = min(grid[1], max(1, round(math.sqrt(area / aspect))))
        top, left = int(top * (grid[0] - height + 1)), int(left * (grid[1] - width + 1))
        block = scores[top : top + height, left : left + width]
        rows, columns = np.nonzero(block == 0)
        block[rows[:missing], columns[:missing]] = 1
        missing -= min(missing, len(rows))
    return scores.reshape(-1)


def block_masks(
    *, grid_size: ImageSize, removed: int, generator_of: Callable[[int], np.random.Generator], positions: np.ndarray
) -> np.ndarray:
    """Return BEiT's block-wise masks, bool [len(positions), L]: at most `removed` patches of each image, often fewer.

    The authors' generator (their masking_generator.py; Bao et al., algorithm 1): blocks of at least 16 of 14 x 14
    patches (as large a share of another grid) and of at most what is missing, of aspect ratio 0.3 to 1 / 0.3, placed
    at random. A block that fills a side, adds nothing, or too much, is drawn again; after ten of them in a row the mask
    stays as it is. `mask_noise` of kind "block" differs: it removes exactly as many, which MAE needs.
    generator_of(group) is the generator of 64 neighbouring positions int [n] in the global batch: a mask is a function
    of its generator and its position alone.
    """
    groups, rows = np.divmod(np.asarray(positions), _POSITIONS_PER_GENERATOR)
    grid = height_and_width(grid_size)
    masks = np.zeros((len(rows), *grid), dtype=bool)
    missing, failures = np.full(len(rows), removed), np.zeros(len(rows), dtype=np.int64)
    smallest = max(1, round(_SMALLEST_BLOCK * math.prod(grid)))
    generators = {int(group): generator_of(int(group)) for group in np.unique(groups)}
    going = np.arange(len(rows))
    attempt, drawn = 0, np.empty((len(rows), _ATTEMPTS, 4))
    while len(going):
        if attempt % _ATTEMPTS == 0:
            for group, draws in generators.items():
                chunk = draws.random((_POSITIONS_PER_GENERATOR, _ATTEMPTS, 4))
                drawn[groups == group] = chunk[rows[groups == group]]
        share, aspect, top, left = drawn[going, attempt % _ATTEMPTS].T  # each [n]
        attempt += 1
        area = smallest + share * (missing[going] - smallest)
        aspect = np.exp((2 * aspect - 1) * _LOG_ASPECT)
        height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        top, left = np.floor(top * (grid[0] - height + 1)), np.floor(left * (grid[1] - width + 1))
        inside = _within(grid[0], top, height)  # [n, rows]
        across = _within(grid[1], left, width)  # [n, columns]
        added = inside[:, :, None] & across[:, None, :] & ~masks[going]
        count = added.sum(axis=(1, 2))
        placed = (height < grid[0]) & (width < grid[1]) & (count > 0) & (count <= missing[going])
        masks[going] |= added & placed[:, None, None]
        missing[going] -= count * placed
        failures[going] = np.where(placed, 0, failures[going] + 1)
        going = going[(missing[going] > 0) & (failures[going] < _FAILURES)]
    return masks.reshape(len(rows), -1)


def _within(length: int, start: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """Return which of `length` places lie from `start` [n] on within `extent` [n]: bool [n, length]."""
    places = np.arange(length)
    return (places >= start[:, None]) & (places < (start + extent)[:, None])
