"""Which images make up global batch t, and how each is cropped, flipped, coloured and erased: pure functions of
the seed.

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
from data_pipeline.rand_augment import LAYERS, draw_operations
from mae_scale.errors import UsageError

if TYPE_CHECKING:
    from data_pipeline.index import Index

ATTEMPTS = 10  # of torchvision's RandomResizedCrop, before it falls back to the middle of the image
_PER_CROP = 4 * ATTEMPTS
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # timm's RandomErasing
_WORD = 2**64


@dataclass(frozen=True)
class BatchPlan:
    """What to load for n positions of a global batch.

    `sample_ids` int64 [n] are rows of the index. `crops` int32 [n, 4] (y, x, height, width) is the part of
    the stored image that is decoded; `regions` float32 [n, 4] (y0, x0, y1, x1, in pixels of that part) is
    resized to the output: the whole part for a random resized crop. `flips` int32 [n] (1: mirrored). `jitter`
    float32 [n, 3] (brightness, contrast, saturation factors) applied in the order `jitter_order` int32 [n,
    3]. `operations` int32 [n, 2] of RandAugment (-1: none) have `arguments` float32 [n, 2]. `erase` int32 [n, 4]
    (y, x, height, width) is the box of the output that is filled with noise, all 0 for none. `valid` bool [n] is
    False for positions that only fill up the last batch of an evaluation.
    """

    positions: np.ndarray
    sample_ids: np.ndarray
    crops: np.ndarray
    regions: np.ndarray
    flips: np.ndarray
    jitter: np.ndarray
    jitter_order: np.ndarray
    operations: np.ndarray
    arguments: np.ndarray
    erase: np.ndarray
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
    operations, arguments = _operations(augmentation, seed, step, global_batch, positions)
    strength = augmentation.jitter
    return BatchPlan(
        positions=positions,
        sample_ids=np.asarray(sample_ids, np.int64),
        crops=crops,
        regions=regions,
        flips=(draws[:, _PER_CROP] < augmentation.flip).astype(np.int32),
        jitter=(1 - strength + 2 * strength * draws[:, _PER_CROP + 1 : _PER_CROP + 4]).astype(np.float32),
        jitter_order=np.argsort(draws[:, _PER_CROP + 4 : _PER_CROP + 7], axis=1).astype(np.int32),
        operations=operations,
        arguments=arguments,
        erase=_boxes_to_erase(augmentation, seed, step, global_batch, positions, image_size),
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
    whole = np.concatenate([np.zeros_like(size), size], axis=1).astype(np.int32)
    if augmentation.crop == "whole":
        return whole, whole.astype(np.float32)
    resized = int(image_size / EVALUATION_CROP) * size // size.min(axis=1, keepdims=True)
    room = resized - image_size
    centre = augmentation.crop == "centre"
    # np.rint, as torchvision's int(round(...)), rounds half to even
    offset = np.rint(room / 2) if centre else np.floor(draws[:, :2] * (room + 1))
    start = offset * size / resized
    end = (offset + image_size) * size / resized
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
    height, width = heights.astype(np.int64), widths.astype(np.int64)
    boxes = _attempts(draws, height, width, scale, ratio)
    sides = boxes[:, :, 2:]
    fits = ((sides > 0) & (sides <= np.stack([height, width], axis=1)[:, None])).all(axis=2)
    found = boxes[np.arange(len(boxes)), np.argmax(fits, axis=1)]

    in_ratio = width / height
    h = np.where(in_ratio < min(ratio), np.rint(width / min(ratio)).astype(np.int64), height)
    w = np.where(in_ratio > max(ratio), np.rint(height * max(ratio)).astype(np.int64), width)
    middle = np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)
    return np.where(fits.any(axis=1)[:, None], found, middle).astype(np.int32)


def _attempts(
    draws: np.ndarray, height: np.ndarray, width: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """Boxes int64 [n, 10, 4] (y, x, height, width) of draws [n, 40], also those that do not fit into [n] `height` x
    `width`."""
    area, log_ratio, y, x = np.moveaxis(draws.reshape(len(draws), ATTEMPTS, 4), 2, 0)
    height, width = height[:, None], width[:, None]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * log_ratio)
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    y = np.floor(y * (height - h + 1)).astype(np.int64)
    x = np.floor(x * (width - w + 1)).astype(np.int64)
    return np.stack([y, x, h, w], axis=2)


def _operations(
    augmentation: Augmentation, seed: int, step: int, global_batch: int, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(operations, arguments) of BatchPlan."""
    if not augmentation.rand_augment:
        shape = len(positions), LAYERS
        return np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    random = generator(seed, "rand_augment", step)
    uniform, normal = random.random((global_batch, LAYERS, 3)), random.standard_normal((global_batch, LAYERS))
    return draw_operations(uniform[positions], normal[positions])


def _boxes_to_erase(
    augmentation: Augmentation, seed: int, step: int, global_batch: int, positions: np.ndarray, image_size: int
) -> np.ndarray:
    """`erase` of BatchPlan."""
    if not augmentation.erasing:
        return np.zeros((len(positions), 4), np.int32)
    draws = generator(seed, "erasing_box", step).random((global_batch, 1 + _PER_CROP))[positions]
    return erasing_boxes(draws, image_size, augmentation.erasing)


def erasing_boxes(draws: np.ndarray, image_size: int, probability: float) -> np.ndarray:
    """timm's RandomErasing (Zhong et al., 2017) for n images: int32 [n, 4] (y, x, height, width), 0 for none.

    `draws` float64 [n, 41] in [0, 1): whether to erase, then as for `random_resized_crops`; the first of ten
    attempts that is smaller than the image counts, and none is erased when there is none.
    """
    side = np.full(len(draws), image_size)
    boxes = _attempts(draws[:, 1:], side, side, ERASED_AREA, ERASED_RATIO)
    fits = (boxes[:, :, 2:] < image_size).all(axis=2)
    found = boxes[np.arange(len(boxes)), np.argmax(fits, axis=1)]
    erased = (draws[:, 0] < probability) & fits.any(axis=1)
    return np.where(erased[:, None], found, 0).astype(np.int32)


def erasing_noise(plan: BatchPlan, *, seed: int, step: int) -> list[tuple[tuple, np.ndarray]]:
    """What random erasing writes: for each box of `plan`, its place in images [n, 3, S, S] and float32 [3, height,
    width] of standard normal noise."""
    patches = []
    for row in np.flatnonzero(plan.erase[:, 2]):
        y, x, height, width = plan.erase[row].tolist()
        random = generator(seed, "erasing", step, int(plan.positions[row]))
        place = int(row), slice(None), slice(y, y + height), slice(x, x + width)
        patches.append((place, random.standard_normal((3, height, width), np.float32)))
    return patches
