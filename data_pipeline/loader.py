"""Batches for training and evaluation: each rank's part of global batch t, as torch tensors.

The same images, crops and bytes whatever the number of ranks, the micro-batch and the number of threads;
starting at step t gives what a run from the beginning gives at step t.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch

from data_pipeline.augment.kinds import Augmentation, augmentation
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batches import Batch, Loading
from data_pipeline.cache import ImageCache
from data_pipeline.dali_graph import Decoding
from data_pipeline.decoder import Decoder
from data_pipeline.errors import UsageError
from data_pipeline.index import Index
from data_pipeline.index_build import check_data
from data_pipeline.plan import BatchPlan, plan_batch, plan_evaluation, steps_per_epoch
from data_pipeline.prefetch import Stream


class _Loader:
    """What both loaders do: set up decoding, run one background stream at a time, close."""

    def __init__(
        self,
        index: Index,
        kind: str | Augmentation,
        *,
        image_size: int,
        seed: int,
        global_batch: int,
        max_batch: int,
        rank: int,
        world_size: int,
        device: str,
        device_id: int | None,
        threads: int,
        bad_image_limit: float,
        on_bad_image: Literal["replace", "stop"],
        prefetch: int,
        draw: Callable[[int, np.ndarray], tuple[torch.Tensor, ...]] = lambda step, positions: (),
        invalidate: bool = False,
        cache: ImageCache | None = None,
        exif_orientation: bool = False,
    ):
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size} ranks; expected 0 to {world_size - 1}")
        if on_bad_image not in ("replace", "stop"):
            raise UsageError(f"data.on_bad_image is '{on_bad_image}'; expected replace or stop")
        if cache is None or index.kind == "shards":  # a cache may hold every image of a folder
            check_data(index)
        index = index.turned() if exif_orientation else index
        self.index, self.image_size = index, image_size
        self.seed, self.global_batch = seed, global_batch
        self.augmentation = augmentation(kind) if isinstance(kind, str) else kind
        self.rank, self.world_size, self._prefetch = rank, world_size, prefetch
        decoding = Decoding(
            self.augmentation,
            image_size,
            device=device,
            device_id=device_id,
            threads=threads,
            exif_orientation=exif_orientation,
        )
        decoder = Decoder(decoding, max_batch)
        self.device = decoder.device
        self._loading = Loading(
            index,
            decoder,
            _Replan(index, self.augmentation, seed, global_batch, image_size),
            draw,
            seed=seed,
            limit=bad_image_limit,
            on_bad_image=on_bad_image,
            invalidate=invalidate,
            cache=cache,
        )
        self._closing: weakref.finalize | None = None

    @property
    def bad_images(self) -> dict[str, str]:
        """Name to reason of the images that this rank has found bad so far."""
        return self._loading.bad_images

    def check_bad_images(self, found: dict[str, str]) -> None:
        """Raise RunError when these, the bad images of all ranks, are more than the limit; it is the same for all."""
        self._loading.check(found)

    @property
    def allowed_bad_images(self) -> int:
        """Number of images that may turn bad."""
        return self._loading.allowed

    def _stream(self, plans: Iterator[tuple[int, BatchPlan]]) -> Iterator[Batch]:
        self._end_stream()
        stream = Stream(self._loading.batches(plans), self._prefetch)
        closing = self._closing = weakref.finalize(self, stream.close)
        try:
            yield from stream
        finally:
            closing()

    def close(self) -> None:
        """End the background thread and let go of DALI's memory; iterating starts anew."""
        self._end_stream()
        self._loading.decoder.close()
        if self._loading.cache is not None:
            self._loading.cache.close()

    def _end_stream(self) -> None:
        if self._closing is not None:
            self._closing()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Replan:
    """The plan of another image in a place of a global batch; refers to no loader, so that those can go."""

    def __init__(self, index: Index, kind: Augmentation, seed: int, global_batch: int, image_size: int):
        self._index, self._kind = index, kind
        self._rest = {"seed": seed, "global_batch": global_batch, "image_size": image_size}

    def __call__(self, number: int, position: int, sample_id: int) -> BatchPlan:
        return plan_batch(
            self._index,
            self._kind,
            number=number,
            positions=np.array([position]),
            sample_ids=np.array([sample_id]),
            **self._rest,
        )


class ImageLoader(_Loader):
    """Endless training batches from `start_step` (to `stop_step`, which is left out).

    `batch_of(step)` is the number of the global batch that a step takes, by default the step itself. What
    `draw(batch number, positions int [n])` gives, tensors on the host, is in `Batch.drawn`; it is called in the
    background thread.
    Iterating gives, for each step, `accumulation` = global_batch // (world_size * micro_batch) batches of
    this rank's contiguous positions [rank * B / R, (rank + 1) * B / R) of the global batch, in order. A
    thread decodes `prefetch` micro-batches ahead with `threads` threads; how many reads are in flight follows
    from how long they take (`read_ahead`). What `cache` holds is not read from the source. With `exif_orientation` each
    image is turned as its EXIF says before it is cut.

    An image that turns bad after indexing is named once in a warning (logger data_pipeline), replaced by the
    next readable image of the index, and counted in `Batch.replaced` and `bad_images`; above
    `bad_image_limit` (share of the index; one is always allowed), or with on_bad_image="stop", iterating
    raises RunError with the list; so it does when the data folder is gone. An image that is damaged, yet decoded, is
    named once and used. Raises UsageError when the batch sizes do not divide, the index is too small, the data folder
    does not exist, or a shard has shrunk.
    """

    def __init__(
        self,
        index: Index,
        augmentation: str | Augmentation = "random_resized_crop",
        *,
        image_size: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        device: str = "auto",
        device_id: int | None = None,
        threads: int = 2,
        start_step: int = 0,
        stop_step: int | None = None,
        batch_of: Callable[[int], int] = int,
        draw: Callable[[int, np.ndarray], tuple[torch.Tensor, ...]] = lambda step, positions: (),
        bad_image_limit: float = 0.001,
        on_bad_image: Literal["replace", "stop"] = "replace",
        prefetch: int = 2,
        cache: ImageCache | None = None,
        exif_orientation: bool = False,
    ):
        layout = batch_layout(global_batch, world_size, micro_batch)
        self.accumulation, self.micro_batch = layout.accumulation, layout.micro_batch
        self.steps_per_epoch = steps_per_epoch(len(index), global_batch)
        self.start_step, self.stop_step = start_step, stop_step
        self._batch_of = batch_of
        super().__init__(
            index,
            augmentation,
            image_size=image_size,
            seed=seed,
            global_batch=global_batch,
            max_batch=layout.micro_batch,
            rank=rank,
            world_size=world_size,
            device=device,
            device_id=device_id,
            threads=threads,
            bad_image_limit=bad_image_limit,
            on_bad_image=on_bad_image,
            prefetch=prefetch,
            draw=draw,
            cache=cache,
            exif_orientation=exif_orientation,
        )

    def __iter__(self) -> Iterator[Batch]:
        share = self.global_batch // self.world_size
        steps = itertools.count(self.start_step) if self.stop_step is None else range(self.start_step, self.stop_step)
        return self._stream(
            _training_plans(
                self.index,
                self.augmentation,
                map(self._batch_of, steps),
                self.micro_batch,
                seed=self.seed,
                global_batch=self.global_batch,
                positions=slice(self.rank * share, (self.rank + 1) * share),
                image_size=self.image_size,
            )
        )


def _training_plans(
    index: Index, kind: Augmentation, numbers: Iterable[int], micro_batch: int, **rest: Any
) -> Iterator[tuple[int, BatchPlan]]:
    """Yield each batch's number and plan, a micro-batch at a time; refers to no loader, so that those can go."""
    for number in numbers:
        plan = plan_batch(index, kind, number=number, **rest)
        for first in range(0, len(plan), micro_batch):
            yield number, plan[first : first + micro_batch]


class EvaluationLoader(_Loader):
    """Every image once, in the order of the index; rank r has its contiguous part of each batch of all ranks.

    All ranks have `len(loader)` batches of `batch_size`; positions behind the last image and images that
    turned bad have `Batch.valid` False (filled with another image, to be left out of every mean).
    """

    def __init__(
        self,
        index: Index,
        augmentation: str | Augmentation = "evaluation",
        *,
        image_size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: str = "auto",
        device_id: int | None = None,
        threads: int = 2,
        bad_image_limit: float = 0.001,
        on_bad_image: Literal["replace", "stop"] = "replace",
        prefetch: int = 2,
        exif_orientation: bool = False,
    ):
        self.batch_size = batch_size
        super().__init__(
            index,
            augmentation,
            image_size=image_size,
            seed=0,
            global_batch=batch_size * world_size,
            max_batch=batch_size,
            rank=rank,
            world_size=world_size,
            device=device,
            device_id=device_id,
            threads=threads,
            bad_image_limit=bad_image_limit,
            on_bad_image=on_bad_image,
            prefetch=prefetch,
            invalidate=True,
            exif_orientation=exif_orientation,
        )

    def __len__(self) -> int:
        return -(-len(self.index) // self.global_batch)

    def __iter__(self) -> Iterator[Batch]:
        positions = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        return self._stream(
            (
                batch,
                plan_evaluation(
                    self.index,
                    self.augmentation,
                    number=batch,
                    global_batch=self.global_batch,
                    positions=positions,
                    image_size=self.image_size,
                ),
            )
            for batch in range(len(self))
        )
