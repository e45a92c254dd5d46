"""Which images make up global batch t, and how each is cropped, flipped and coloured: pure functions of the
seed.

Every number is drawn for the whole global batch from a counter-based generator keyed by (seed, what for,
step), and then cut to the positions that are asked for. So it depends on (seed, step, position in the global
batch, image size) alone: not on ranks, micro-batches, threads, or what was drawn before.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.augmentations import EVALUATION_CROP, Augmentation
from mae_scale.errors import UsageError

if TYPE_CHECKING:
    from data_pipeline.index import Index

ATTEMPTS = 10  # of torchvision's RandomResizedCrop, before it falls back to the middle of the image
_PER_CROP = 4 * ATTEMPTS
_WORD = 2**64


@dataclass(frozen=True)
class BatchPlan:
    """What to load for n positions of a global batch.

    `sample_ids` int64 [n] are rows of the index. `crops` int32 [n, 4] (y, x, height, width) is the part of
    the stored image that is decoded; `regions` float32 [n, 4] (y0, x0, y1, x1, in pixels of that part) is
    resized to the output: the whole part for a random resized crop. `flips` int32 [n] (1: mirrored). `jitter`
    float32 [n, 3] (brightness, contrast, saturation factors) applied in the order `jitter_order` int32 [n,
    3]. `valid` bool [n] is False for positions that only fill up the last batch of an evaluation.
    """

    positions: np.ndarray
    sample_ids: np.ndarray
    crops: np.ndarray
    regions: np.ndarray
    flips: np.ndarray
    jitter: np.ndarray
    jitter_order: np.ndarray
    valid: np.ndarray

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, rows: slice | np.ndarray) -> BatchPlan:
        return BatchPlan(**{name: column[rows] for name, column in vars(self).items()})


def generator(seed: int, stream: str | int, step: int, position: int = 0) -> np.random.Generator:
    """A generator for (seed, stream, step, position), independent of every other and of what was drawn
    before.

    Philox 4x64 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011): seed and stream are the
    key; step and position are the upper half of the counter, and 2^128 draws fit below them.
    """
    words = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest()
    key = np.frombuffer(words, "<u8")
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, position % _WORD, step % _WORD]))


def steps_per_epoch(num_images: int, global_batch: int) -> int:
    """num_images // global_batch.

    The remainder, num_images mod global_batch images drawn anew by each epoch's permutation, is left out of
    that epoch, as in the authors' release (drop_last); every other image is seen exactly once. Raises
    UsageError when there are fewer images than one global batch holds.
    """
    steps = num_images // global_batch
    if steps == 0:
        raise UsageError(
            f"data.global_batch is {global_batch}, but there are {num_images} images; it must be at most {num_images}"
        )
    return steps


@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order of epoch `epoch`: int64 [num_images], read-only.

    It sorts raw 64-bit draws, so that no release of NumPy can change it (its own `permutation` is not
    promised).
    """
    draws = generator(seed, "order", epoch).bit_generator.random_raw(num_images)
    permutation = np.argsort(draws, kind="stable")
    permutation.flags.writeable = False
    return permutation


def plan_batch(
    index: Index,
    augmentation: Augmentation,
    *,
    seed: int,
    step: int,
    global_batch: int,
    positions: slice | np.ndarray = slice(None),
    image_size: int = 224,
    sample_ids: np.ndarray | None = None,
) -> BatchPlan:
    """The plan of `positions` of global batch `step` (0-based; epoch step // steps_per_epoch).

    `sample_ids` [len(positions)] puts other images in their places, with the same random numbers.
    """
    positions = np.arange(global_batch)[positions]
    if sample_ids is None:
        steps = steps_per_epoch(len(index), global_batch)
        epoch, within = divmod(step, steps)
        sample_ids = epoch_permutation(seed, epoch, len(index))[within * global_batch + positions]
    draws = generator(seed, "augmentation", step).random((global_batch, _PER_CROP + 8))[positions]
    heights, widths = index.height[sample_ids], index.width[sample_ids]
    crops, regions = _crops(augmentation, draws[:, :_PER_CROP], heights, widths, image_size)
    strength = augmentation.jitter
    return BatchPlan(
        positions=positions,
        sample_ids=np.asarray(sample_ids, np.int64),
        crops=crops,
        regions=regions,
        flips=(draws[:, _PER_CROP] < augmentation.flip).astype(np.int32),
        jitter=(1 - strength + 2 * strength * draws[:, _PER_CROP + 1 : _PER_CROP + 4]).astype(np.float32),
        jitter_order=np.argsort(draws[:, _PER_CROP + 4 : _PER_CROP + 7], axis=1).astype(np.int32),
        valid=np.ones(len(positions), bool),
    )


def plan_evaluation(
    index: Index,
    augmentation: Augmentation,
    *,
    batch: int,
    global_batch: int,
    positions: slice,
    image_size: int = 224,
) -> BatchPlan:
    """The plan of `positions` of evaluation batch `batch`: every image once, in the order of the index.

    The last batch is filled up with the last image, marked not valid, so that all ranks have as many batches.
    """
    positions = np.arange(global_batch)[positions]
    wanted = batch * global_batch + positions
    sample_ids = np.minimum(wanted, len(index) - 1)
    plan = plan_batch(
        index,
        augmentation,
        seed=0,
        step=batch,
        global_batch=global_batch,
        positions=positions,
        image_size=image_size,
        sample_ids=sample_ids,
    )
    plan.valid[:] = wanted < len(index)
    return plan


def _crops(
    augmentation: Augmentation, draws: np.ndarray, heights: np.ndarray, widths: np.ndarray, image_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(crops int32 [n, 4], regions float32 [n, 4]) of BatchPlan, from draws [n, 40] in [0, 1)."""
    if augmentation.crop == "random_resized":
        crops = random_resized_crops(draws, heights, widths, augmentation.scale, augmentation.ratio)
        regions = np.concatenate([np.zeros_like(crops[:, :2]), crops[:, 2:]], axis=1)
        return crops, regions.astype(np.float32)
    size = np.stack([heights, widths], axis=1).astype(np.int64)
    resized = int(image_size / EVALUATION_CROP) * size // size.min(axis=1, keepdims=True)
    room = resized - image_size
    centre = augmentation.crop == "centre"
    # np.rint, as torchvision's int(round(...)), rounds half to even
    offset = np.rint(room / 2) if centre else np.floor(draws[:, :2] * (room + 1))
    start = offset * size / resized
    end = (offset + image_size) * size / resized
    whole = np.concatenate([np.zeros_like(size), size], axis=1).astype(np.int32)
    return whole, np.concatenate([start, end], axis=1).astype(np.float32)


def random_resized_crops(
    draws: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """torchvision's RandomResizedCrop.get_params for n images: int32 [n, 4] (y, x, height, width).

    `draws` float64 [n, 40] in [0, 1): area, log-ratio, y and x of each of ten attempts; the first that fits
    counts, otherwise the largest middle crop whose ratio is allowed.
    """
    n = len(heights)
    height, width = heights.astype(np.int64)[:, None], widths.astype(np.int64)[:, None]
    area, log_ratio, y, x = np.moveaxis(draws.reshape(n, ATTEMPTS, 4), 2, 0)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * log_ratio)
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    y = np.floor(y * (height - h + 1)).astype(np.int64)
    x = np.floor(x * (width - w + 1)).astype(np.int64)
    first = np.argmax(fits, axis=1)
    found = np.stack([y, x, h, w], axis=2)[np.arange(n), first]

    height, width = height[:, 0], width[:, 0]
    in_ratio = width / height
    h = np.where(in_ratio < min(ratio), np.rint(width / min(ratio)).astype(np.int64), height)
    w = np.where(in_ratio > max(ratio), np.rint(height * max(ratio)).astype(np.int64), width)
    middle = np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
    return np.where(fits.any(axis=1)[:, None], found, middle).astype(np.int32)
