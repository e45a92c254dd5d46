"""Turn plans into tensors: read, decode, replace bad images, erase. A loader's background thread does it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from data_pipeline.arrays import BoolArray, Int64Array, Uint8Array
from data_pipeline.augment.random_erasing import Patch, erase, erasing_noise
from data_pipeline.bad_images import BadImages, listed
from data_pipeline.batch_order import BatchOrder
from data_pipeline.byte_reader import ByteReader
from data_pipeline.cache import ImageCache
from data_pipeline.decoder import Decoder
from data_pipeline.errors import BadImage, RunError
from data_pipeline.index import Index
from data_pipeline.plan import BatchPlan
from data_pipeline.read_ahead import ReadAhead

if TYPE_CHECKING:
    from data_pipeline.decoder import Views

Read = Callable[[int], tuple[Uint8Array, bool]]
"""Returns an image's encoded bytes, and whether they come from the cache."""
Reads = list[Future[tuple[Uint8Array, bool]]]
"""The results of `Read` for the images of a plan."""
Annotate = Callable[[BatchPlan], Any]
"""Returns what is annotated in the image of a one-row plan, placed as the plan places its pixels. Raises BadImage when
that is damaged: the image is then replaced as one whose pixels are."""
Draw = Callable[[int, Int64Array], tuple[torch.Tensor, ...]]
"""Draws tensors for the positions of a batch, from its number and the positions."""

log = logging.getLogger("data_pipeline")

_damaged: set[tuple[Path, str]] = set()  # (root, name) of the damaged images that this process has warned of


@dataclass
class Batch:
    """A micro-batch of n images.

    `images` float32 [n, 3, S, S], normalised by ImageNet's mean and std, then erased in boxes where that was
    drawn, on the GPU that decoded them or on the CPU (pinned when there is a GPU); `labels` int64 [n] on the
    same device, -1 without a label; `sample_ids` [n] the rows of the index, those of the replacements where images
    were bad; `positions` [n] in the global batch; `valid` [n], False for filled-up positions and bad images of an
    evaluation; `number` the number of the global batch; `replaced` the number of bad images; `cache_hits` the number
    of images read from the cache; `drawn` the tensors of `Draw`, on the host (pinned when there is a GPU);
    `second` the images' second view, float32 [n, 3, H, W], beside `images`, where one is asked for; `annotated`
    the results of `Annotate`, one per image.
    """

    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: Int64Array
    positions: Int64Array
    valid: BoolArray
    number: int
    replaced: int
    cache_hits: int = 0
    drawn: tuple[torch.Tensor, ...] = ()
    second: torch.Tensor | None = None
    annotated: tuple[Any, ...] = ()


def draw_nothing(number: int, positions: Int64Array) -> tuple[torch.Tensor, ...]:
    """Return no tensors."""
    return ()


@dataclass
class _Filling:
    """A micro-batch before it is a `Batch`: its plan and encoded images, and the rows whose images were replaced."""

    number: int
    plan: BatchPlan
    encoded: list[Uint8Array]
    replaced: set[int] = field(default_factory=set)


class Loading:
    """The reading and decoding of an order's micro-batches; a bad image is replaced by the next readable one.

    `draw` gives `Batch.drawn`, `annotate` `Batch.annotated`; `cache` is read before the source. An image found bad is
    tried again each time, so that a batch depends on the files alone and not on what this process found before.
    """

    def __init__(
        self,
        index: Index,
        order: BatchOrder,
        decoder: Decoder,
        *,
        draw: Draw,
        annotate: Annotate | None,
        bad_images: BadImages,
        cache: ImageCache | None,
    ):
        self.index, self.order, self.decoder = index, order, decoder
        self.draw, self.annotate, self.bad_images, self.cache = draw, annotate, bad_images, cache
        self._stream: torch.cuda.Stream | None = None

    def close(self) -> None:
        """Release the decoder's memory and remove the cache's temporary folder."""
        self.decoder.close()
        if self.cache is not None:
            self.cache.close()

    def batches(self) -> Generator[Batch]:
        """Yield the batches of the order.

        While a batch is decoded, the images of the next plans are read: of at least one plan, and of enough plans to
        hold twice the reads in flight.
        """
        read = self._reading()
        with ReadAhead(read) as ahead:
            waiting: deque[tuple[int, BatchPlan, Reads]] = deque()
            for number, plan in self.order.plans(self.index, self.decoder.decoding):
                waiting.append((number, plan, [ahead.submit(int(image)) for image in plan.sample_ids]))
                while sum(len(plan) for _, plan, _ in waiting) - len(waiting[0][1]) >= max(1, 2 * ahead.in_flight):
                    yield self._finish(read, *waiting.popleft())
            while waiting:
                yield self._finish(read, *waiting.popleft())

    def _reading(self) -> Read:
        reader, cache = ByteReader(self.index), self.cache
        if cache is None:
            return lambda image: (reader.read(image), False)
        return lambda image: cache.read(image, reader.read)

    def _finish(self, read: Read, number: int, plan: BatchPlan, reads: Reads) -> Batch:
        filling = _Filling(number, plan, [np.zeros(0, np.uint8)] * len(plan))
        cache_hits = 0
        for row, future in enumerate(reads):
            try:
                filling.encoded[row], is_cached = future.result()
                cache_hits += is_cached
            except BadImage as error:
                self._replace(read, filling, row, error)
        views = self._decode(read, filling)
        annotated, replaced = self._annotated(read, filling)
        if replaced:
            views = self._decode(read, filling)
        plan = filling.plan
        labels = self.index.label[plan.sample_ids].astype(np.int64)
        patches = erasing_noise(plan.erase, plan.positions, seed=self.order.seed, number=number)
        images, on_device, second = to_torch(views, labels, patches, self._copy_stream())
        self._name_damaged(filling.encoded, plan)
        return Batch(
            images,
            on_device,
            plan.sample_ids,
            plan.positions,
            plan.valid,
            number=number,
            replaced=len(filling.replaced),
            cache_hits=cache_hits,
            drawn=tuple(_pinned(tensor) for tensor in self.draw(number, plan.positions)),
            second=second,
            annotated=annotated,
        )

    def _annotated(self, read: Read, filling: _Filling) -> tuple[tuple[Any, ...], bool]:
        """Return what is annotated in each image, and whether images were replaced for damage of it."""
        if self.annotate is None:
            return (), False
        found, before = [], len(filling.replaced)
        for row in range(len(filling.plan)):
            try:
                found.append(self.annotate(filling.plan[row : row + 1]))
            except BadImage as error:
                self._replace(read, filling, row, error)
                found.append(self.annotate(filling.plan[row : row + 1]))
        return tuple(found), len(filling.replaced) > before

    def _decode(self, read: Read, filling: _Filling) -> Views:
        """Return the views of the decoded images, those that cannot be decoded replaced."""
        try:
            return self.decoder.decode(filling.encoded, filling.plan)
        except BadImage as failure:  # DALI does not say which: decode one by one
            before = set(filling.replaced)
            for row in set(range(len(filling.plan))) - before:
                try:
                    self.decoder.decode([filling.encoded[row]], filling.plan[row : row + 1])
                except BadImage as error:
                    self._replace(read, filling, row, error)
            if filling.replaced == before:
                raise _no_image_is_bad(filling.number, failure) from failure
            try:
                return self.decoder.decode(filling.encoded, filling.plan)
            except BadImage as again:
                raise _no_image_is_bad(filling.number, again) from again

    def _replace(self, read: Read, filling: _Filling, row: int, error: BadImage) -> None:
        """Put the next readable image in the place of a bad one. Raises RunError when none is left or allowed."""
        plan = filling.plan
        bad, position = int(plan.sample_ids[row]), int(plan.positions[row])
        self._note(bad, error)
        for ahead in range(1, len(self.index)):
            image = (bad + ahead) % len(self.index)
            one = self.order.replan(self.index, self.decoder.decoding, filling.number, position, image)
            try:
                encoded, _ = read(image)
                self.decoder.decode([encoded], one)
                if self.annotate is not None:
                    self.annotate(one)
            except BadImage as another:
                self._note(image, another)
                continue
            filling.encoded[row], filling.plan = encoded, plan.with_row(row, one)
            filling.replaced.add(row)
            return
        raise RunError(f"no image of {self.index.root} can be read any more: {listed(self.bad_images.found)}")

    def _copy_stream(self) -> torch.cuda.Stream | None:
        """Return the stream on which images are copied, always the same: memory is kept per stream. None on the CPU."""
        if self.decoder.device_id is not None and self._stream is None:
            self._stream = torch.cuda.Stream(self.decoder.device_id)
        return self._stream

    def _name_damaged(self, encoded: list[Uint8Array], plan: BatchPlan) -> None:
        """Warn once of each damaged image of the batch that was just decoded all the same.

        When the decoders report more damage than the known damaged images explain, the others are decoded one by one.
        """
        complaints = len(self.decoder.damage)
        if not complaints:
            return
        names = [(self.index.root, self.index.name(int(image))) for image in plan.sample_ids]
        if complaints <= sum(name in _damaged for name in names):
            return
        for row, name in enumerate(names):
            if name not in _damaged:
                self.decoder.decode([encoded[row]], plan[row : row + 1])
                if self.decoder.damage:
                    _damaged.add(name)
                    log.warning(
                        "damaged image %s/%s: %s; its pixels are used as they were decoded",
                        *name,
                        self.decoder.damage[0],
                    )

    def _note(self, image: int, error: BadImage) -> None:
        if self.cache is not None:
            self.cache.forget(image)
        self.bad_images.add(image, error)


def _no_image_is_bad(number: int, failure: BadImage) -> RunError:
    return RunError(
        f"batch {number} {failure}, although each of its images alone can, perhaps for lack of memory; choose a "
        "smaller engine.micro_batch or fewer data.threads"
    )


def to_torch(
    views: Views, labels: Int64Array, patches: list[Patch], stream: torch.cuda.Stream | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return DALI's dense float32 tensor list of the first view, with `patches` (of `erasing_noise`) written over it,
    int64 labels, and the second view, if there is one, as torch tensors, complete when this returns.

    On the CPU nothing is copied: an output of DALI's default executor lives as long as something refers to it. On the
    GPU the copy is made and waited for on `stream`; `prefetch.Stream` records the consumer's stream.
    """
    if stream is None:
        first, *others = (from_dlpack(view.as_tensor()) for view in views)
        erase(first, patches)
        return _pinned(first), _pinned(torch.from_numpy(labels)), _pinned(others[0]) if others else None
    with torch.cuda.stream(stream):
        first, *others = (from_dlpack(view.as_tensor()).clone() for view in views)
        erase(first, patches)
        on_device = torch.from_numpy(labels).to(stream.device)
    stream.synchronize()
    return first, on_device, others[0] if others else None


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in page-locked memory when there is a GPU, so that its copy to the GPU can be asynchronous."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
