"""Plan which images make up global batch t, and how each is cropped, flipped, coloured and erased.

Pure functions of the seed: every number is drawn for the whole global batch from the counter-based generator, keyed by
(seed, stream, batch number), and then cut to the requested positions. So it depends on (seed, batch number,
position in the global batch, image size) alone: not on ranks, micro-batches, threads, or what was drawn before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from data_pipeline.arrays import BoolArray, Float32Array, Int32Array, Int64Array
from data_pipeline.augment import blur, colour_jitter, crop, flip, rand_augment, random_erasing, solarise
from data_pipeline.augment.kinds import Augmentation, SecondView
from data_pipeline.errors import UsageError
from data_pipeline.image_size import ImageSize
from data_pipeline.index import Index
from data_pipeline.rng import generator

# The numbers of each augmentation among those drawn for an image; saved runs rely on these places.
_CROP = slice(0, crop.DRAWS)
_FLIP = slice(_CROP.stop, _CROP.stop + flip.DRAWS)
_JITTER = slice(_FLIP.stop, _FLIP.stop + colour_jitter.DRAWS)
_DRAWS = 48
# Those of augmentations that came later, drawn apart.
_HUE = slice(0, colour_jitter.HUE_DRAWS)
_BLUR = slice(_HUE.stop, _HUE.stop + blur.DRAWS)
_SOLARISE = slice(_BLUR.stop, _BLUR.stop + solarise.DRAWS)
_LATER_DRAWS = 8


@dataclass(frozen=True)
class BatchPlan:
    """The images of n positions of a global batch, and how each is cropped and augmented.

    `sample_ids` int64 [n] are rows of the index. `crops` int32 [n, 4] (y, x, height, width) is the part of
    the stored image that is decoded; `regions` float32 [n, 4] (y0, x0, y1, x1, in pixels of that part) is
    resized to the output: the whole part for a random resized crop. `filled` int32 [n, 2] (height, width) is what the
    image fills of the output, from its upper left corner; beyond it is 0. `flips` int32 [n] (1: mirrored). `jitter`
    float32 [n, 3] (brightness, contrast, saturation factors; saturation 0: grey) applied in the order `jitter_order`
    int32 [n, 3], with the hue turned by `hue` float32 [n] degrees. `blur` float32 [n] is the sigma of the blur as a
    share of the output's shorter side (0: none), `solarise` int32 [n] the level from which on levels become their
    negative. `operations` int32 [n, 2] of RandAugment (-1: none) have `arguments` float32 [n, 2]. `erase` int32 [n, 4]
    (y, x, height, width) is the box of the output that is filled with noise, all 0 for none. `valid` bool [n] is False
    for positions that only fill up the last batch of an evaluation, and in place of its bad images. `second` is the
    plan of a second view, cut from the same decoded part; None without one.
    """

    positions: Int64Array
    sample_ids: Int64Array
    crops: Int32Array
    regions: Float32Array
    filled: Int32Array
    flips: Int32Array
    jitter: Float32Array
    jitter_order: Int32Array
    hue: Float32Array
    blur: Float32Array
    solarise: Int32Array
    operations: Int32Array
    arguments: Float32Array
    erase: Int32Array
    valid: BoolArray
    second: BatchPlan | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getitem__(self, rows: slice | Int64Array) -> BatchPlan:
        second = None if self.second is None else self.second[rows]
        return BatchPlan(**{name: column[rows] for name, column in self._columns().items()}, second=second)

    def with_row(self, row: int, other: BatchPlan) -> BatchPlan:
        """Return this plan with another image, the only one of `other`, in row `row`."""
        columns = {name: column.copy() for name, column in self._columns().items()}
        for name, column in columns.items():
            column[row] = getattr(other, name)[0]
        second = None
        if self.second is not None and other.second is not None:
            second = self.second.with_row(row, other.second)
        return BatchPlan(**columns, second=second)

    def _columns(self) -> dict[str, Any]:
        return {name: column for name, column in vars(self).items() if name != "second"}


def steps_per_epoch(num_images: int, global_batch: int) -> int:
    """Return num_images // global_batch.

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
def epoch_permutation(seed: int, epoch: int, num_images: int) -> Int64Array:
    """Return the order of epoch `epoch`: int64 [num_images], read-only.

    It sorts raw 64-bit draws, so that no release of NumPy can change it, as it may change its own `permutation`.
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
    number: int,
    global_batch: int,
    positions: slice | Int64Array = slice(None),
    image_size: ImageSize = 224,
    sample_ids: Int64Array | None = None,
    second: SecondView | None = None,
) -> BatchPlan:
    """Return the plan of `positions` of global batch `number` (from 0; of epoch number // steps_per_epoch).

    `sample_ids` [len(positions)] puts other images in their places, with the same random numbers. `second` asks for a
    second view of each image.
    """
    positions = np.arange(global_batch)[positions]
    if sample_ids is None:
        epoch, within = divmod(number, steps_per_epoch(len(index), global_batch))
        sample_ids = epoch_permutation(seed, epoch, len(index))[within * global_batch + positions]
    sample_ids = np.asarray(sample_ids, np.int64)

    def view(kind: Augmentation, size: ImageSize, prefix: str = "") -> BatchPlan:
        def random(stream: str) -> np.random.Generator:
            return generator(seed, prefix + stream, number)

        return _plan_view(
            index,
            kind,
            random,
            global_batch=global_batch,
            positions=positions,
            image_size=size,
            sample_ids=sample_ids,
        )

    first = view(augmentation, image_size)
    if second is None:
        return first
    if second.augmentation is None:
        return replace(first, second=first)
    return _in_one_part(first, view(second.augmentation, second.image_size, "second_view/"))


def _in_one_part(first: BatchPlan, second: BatchPlan) -> BatchPlan:
    """Return the plan of two views, whose regions lie in one part of the stored image that holds both crops."""
    ends = [plan.crops[:, :2] + plan.crops[:, 2:] for plan in (first, second)]
    start = np.minimum(first.crops[:, :2], second.crops[:, :2])
    crops = np.concatenate([start, np.maximum(*ends) - start], axis=1)
    first, second = (
        replace(plan, crops=crops, regions=plan.regions + np.tile(plan.crops[:, :2] - start, 2).astype(np.float32))
        for plan in (first, second)
    )
    return replace(first, second=second)


def _plan_view(
    index: Index,
    augmentation: Augmentation,
    random: Callable[[str], np.random.Generator],
    *,
    global_batch: int,
    positions: Int64Array,
    image_size: ImageSize,
    sample_ids: Int64Array,
) -> BatchPlan:
    """Return the plan of one view; random(stream) is the generator of the global batch."""
    draws = random("augmentation").random((global_batch, _DRAWS))[positions]
    later = random("later_augmentations").random((global_batch, _LATER_DRAWS))[positions]
    heights, widths = index.height[sample_ids], index.width[sample_ids]
    crops, regions, filled = crop.draw_crops(augmentation, draws[:, _CROP], heights, widths, image_size)
    jitter, jitter_order = colour_jitter.draw_jitter(augmentation, draws[:, _JITTER])
    jitter, hue = colour_jitter.draw_hue(augmentation, jitter, later[:, _HUE])
    operations, arguments = _operations(augmentation, random("rand_augment"), global_batch, positions)
    erase = _boxes_to_erase(augmentation, random("erasing_box"), global_batch, positions, image_size)
    return BatchPlan(
        positions=positions,
        sample_ids=sample_ids,
        crops=crops,
        regions=regions,
        filled=filled,
        flips=flip.draw_flips(augmentation.flip, draws[:, _FLIP]),
        jitter=jitter,
        jitter_order=jitter_order,
        hue=hue,
        blur=blur.draw_blur(augmentation, later[:, _BLUR]),
        solarise=solarise.draw_thresholds(augmentation, later[:, _SOLARISE]),
        operations=operations,
        arguments=arguments,
        erase=erase,
        valid=np.ones(len(positions), bool),
    )


def _operations(
    augmentation: Augmentation, random: np.random.Generator, global_batch: int, positions: Int64Array
) -> tuple[Int32Array, Float32Array]:
    """Return `operations` and `arguments` of the plan."""
    if not augmentation.rand_augment:
        shape = len(positions), rand_augment.LAYERS
        return np.full(shape, rand_augment.NO_OPERATION, np.int32), np.zeros(shape, np.float32)
    shape = global_batch, rand_augment.LAYERS
    uniform, normal = random.random((*shape, 3)), random.standard_normal(shape)
    return rand_augment.draw_operations(uniform[positions], normal[positions])


def _boxes_to_erase(
    augmentation: Augmentation,
    random: np.random.Generator,
    global_batch: int,
    positions: Int64Array,
    image_size: ImageSize,
) -> Int32Array:
    """Return `erase` of the plan."""
    if not augmentation.erasing:
        return np.zeros((len(positions), 4), np.int32)
    draws = random.random((global_batch, random_erasing.DRAWS))[positions]
    return random_erasing.erasing_boxes(draws, image_size, augmentation.erasing)
