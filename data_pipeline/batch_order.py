"""The order of batches: shuffled epochs for training, or every image once for evaluation; one rank's part of each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_pipeline.arrays import Int64Array
from data_pipeline.batch_layout import BatchLayout, batch_layout
from data_pipeline.dali_graph import Decoding
from data_pipeline.index import Index
from data_pipeline.plan import BatchPlan, plan_batch


class BatchOrder(Protocol):
    """One rank's micro-batches in their order."""

    @property
    def layout(self) -> BatchLayout:
        """Return the sizes of global batch and micro-batch."""

    @property
    def seed(self) -> int:
        """Return the seed of all random numbers."""

    def plans(self, index: Index, decoding: Decoding) -> Iterator[tuple[int, BatchPlan]]:
        """Yield each micro-batch's plan, and the number of its global batch."""

    def replan(self, index: Index, decoding: Decoding, number: int, position: int, image: int) -> BatchPlan:
        """Return the one-row plan that puts `image` in the place of a bad one, with the same random numbers."""


@dataclass(frozen=True)
class TrainingOrder:
    """Shuffled epochs, endless or up to `stop_step` (exclusive); each step has `layout.accumulation` micro-batches.

    `batch_of(step)` is the number of the global batch that a step takes, by default the step itself.
    """

    layout: BatchLayout
    rank: int = 0
    seed: int = 0
    start_step: int = 0
    stop_step: int | None = None
    batch_of: Callable[[int], int] = int

    def plans(self, index: Index, decoding: Decoding) -> Iterator[tuple[int, BatchPlan]]:
        """Yield each micro-batch's plan, and the number of its global batch."""
        positions, micro_batch = self.layout.positions(self.rank), self.layout.micro_batch
        steps = itertools.count(self.start_step) if self.stop_step is None else range(self.start_step, self.stop_step)
        for number in map(self.batch_of, steps):
            plan = _plan(self, index, decoding, number=number, positions=positions)
            for first in range(0, len(plan), micro_batch):
                yield number, plan[first : first + micro_batch]

    def replan(self, index: Index, decoding: Decoding, number: int, position: int, image: int) -> BatchPlan:
        """Return the one-row plan that puts `image` in the place of a bad one, with the same random numbers."""
        return _plan(self, index, decoding, number=number, positions=np.array([position]), sample_ids=np.array([image]))


@dataclass(frozen=True)
class EvaluationOrder:
    """Every image once, in the order of the index; all ranks have equally many batches of `batch_size`.

    The last batch is filled up with the last image. Neither these positions nor those of bad images are valid.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def layout(self) -> BatchLayout:
        """Return the sizes of global batch and micro-batch: a rank's whole share is one micro-batch."""
        return batch_layout(self.batch_size * self.world_size, self.world_size)

    @property
    def seed(self) -> int:
        """Return the seed of all random numbers, always 0."""
        return 0

    def plans(self, index: Index, decoding: Decoding) -> Iterator[tuple[int, BatchPlan]]:
        """Yield each batch's plan, and its number."""
        global_batch = self.layout.global_batch
        positions = np.arange(global_batch)[self.layout.positions(self.rank)]
        for number in range(-(-len(index) // global_batch)):
            wanted = number * global_batch + positions
            images = np.minimum(wanted, len(index) - 1)
            plan = _plan(self, index, decoding, number=number, positions=positions, sample_ids=images)
            plan.valid[:] = wanted < len(index)
            yield number, plan

    def replan(self, index: Index, decoding: Decoding, number: int, position: int, image: int) -> BatchPlan:
        """Return the one-row plan, not valid, that puts `image` in the place of a bad one."""
        plan = _plan(self, index, decoding, number=number, positions=np.array([position]), sample_ids=np.array([image]))
        plan.valid[:] = False
        return plan


def _plan(
    order: BatchOrder,
    index: Index,
    decoding: Decoding,
    *,
    number: int,
    positions: slice | Int64Array,
    sample_ids: Int64Array | None = None,
) -> BatchPlan:
    return plan_batch(
        index,
        decoding.augmentation,
        seed=order.seed,
        number=number,
        global_batch=order.layout.global_batch,
        positions=positions,
        image_size=decoding.image_size,
        sample_ids=sample_ids,
        second=decoding.second,
    )
