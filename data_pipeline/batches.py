"""Plans to tensors in a background thread, for both loaders: read, decode, replace bad images, erase, queue."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data_pipeline.augment.random_erasing import erase, erasing_noise
from data_pipeline.byte_reader import ByteReader
from data_pipeline.cache import ImageCache
from data_pipeline.decoder import Decoder
from data_pipeline.errors import BadImage, RunError
from data_pipeline.folder_listing import folder_problem
from data_pipeline.index import Index
from data_pipeline.plan import BatchPlan
from data_pipeline.read_ahead import ReadAhead

SHOWN = 20  # bad images listed when a run stops

Read = Callable[[int], tuple[np.ndarray, bool]]  # an image's encoded bytes, and whether they come from the cache

log = logging.getLogger("data_pipeline")

_damaged: set[tuple[Path, str]] = set()  # (root, name) of the images that this process has named


@dataclass
class Batch:
    """A micro-batch of n images.

    `images` float32 [n, 3, S, S], normalised by ImageNet's mean and std, then erased in boxes where that was
    drawn, on the GPU that decoded them or on the CPU (pinned when there is a GPU); `labels` int64 [n] on the
    same device, -1 without a label;
    `sample_ids` int64 [n] (NumPy), rows of the index, those of the replacements where images were bad;
    `positions` int64 [n] (NumPy) in the global batch; `valid` bool [n] (NumPy), False for filling and for bad
    images of an evaluation; `number` the number of the batch; `replaced` how many of the n were bad; `cache_hits` how
    many were read from the cache; `drawn` what else was drawn for these positions, on the host (pinned when there is a
    GPU).
    """

    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: np.ndarray
    positions: np.ndarray
    valid: np.ndarray
    number: int
    replaced: int
    cache_hits: int = 0
    drawn: tuple[torch.Tensor, ...] = ()


class Loading:
    """Turns plans into batches, replacing images that cannot be read or decoded by the next readable ones.

    `replan(number, position, sample_id)` gives the one-row plan of another image in that place, with the same
    random numbers; `draw(number, positions)` gives `Batch.drawn`; `seed` is for the noise of random erasing; `cache` is
    read before the source. Whether an image is bad is judged anew each time, so that a batch depends on the files alone
    and not on what this process met before. `bad_images` maps each bad name met so far to its reason.
    """

    def __init__(
        self,
        index: Index,
        decoder: Decoder,
        replan: Callable[[int, int, int], BatchPlan],
        draw: Callable[[int, np.ndarray], tuple[torch.Tensor, ...]],
        *,
        seed: int,
        limit: float,
        on_bad_image: Literal["replace", "stop"],
        invalidate: bool = False,
        cache: ImageCache | None = None,
    ):
        self.index, self.decoder, self.replan, self.draw = index, decoder, replan, draw
        self.seed, self.on_bad_image, self.invalidate = seed, on_bad_image, invalidate
        self.allowed = max(1, int(limit * len(index)))
        self.limit, self.cache = limit, cache
        self.bad_images: dict[str, str] = {}
        self._stream: torch.cuda.Stream | None = None

    def batches(self, plans: Iterator[tuple[int, BatchPlan]]) -> Iterator[Batch]:
        """Yield one batch for each (number, plan).

        While a batch is decoded, the reads of at least one more plan go on, and of enough plans that twice the
        reads in flight are ahead.
        """
        read = self._reading()
        with ReadAhead(read) as ahead:
            waiting: deque[tuple[int, BatchPlan, list[Future]]] = deque()
            for number, plan in plans:
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

    def _finish(self, read: Read, number: int, plan: BatchPlan, reads: list[Future]) -> Batch:
        encoded: list[np.ndarray] = [None] * len(plan)
        replaced: set[int] = set()
        cache_hits = 0

        def put_another(row: int, error: BadImage) -> None:
            nonlocal plan
            self._note(int(plan.sample_ids[row]), error)
            encoded[row], plan = self._neighbour(read, number, plan, row)
            replaced.add(row)

        for row, future in enumerate(reads):
            try:
                encoded[row], is_cached = future.result()
                cache_hits += is_cached
            except BadImage as error:
                put_another(row, error)
        try:
            images = self.decoder.decode(encoded, plan)
        except BadImage as failure:  # DALI does not say which: decode one by one
            before = len(replaced)
            for row in set(range(len(plan))) - replaced:
                try:
                    self.decoder.decode([encoded[row]], plan[row : row + 1])
                except BadImage as error:
                    put_another(row, error)
            if len(replaced) == before:
                raise _no_image_is_bad(number, failure) from failure
            try:
                images = self.decoder.decode(encoded, plan)
            except BadImage as again:
                raise _no_image_is_bad(number, again) from again
        valid = plan.valid.copy()
        if self.invalidate:
            valid[list(replaced)] = False
        labels = self.index.label[plan.sample_ids].astype(np.int64)
        patches = erasing_noise(plan.erase, plan.positions, seed=self.seed, number=number)
        tensors = to_torch(images, labels, patches, self._copy_stream())
        self._name_damaged(encoded, plan)
        drawn = tuple(_pinned(tensor) for tensor in self.draw(number, plan.positions))
        return Batch(
            *tensors,
            plan.sample_ids,
            plan.positions,
            valid,
            number=number,
            replaced=len(replaced),
            cache_hits=cache_hits,
            drawn=drawn,
        )

    def _copy_stream(self) -> torch.cuda.Stream | None:
        """Return the stream on which images are copied; None on the CPU. One: the allocator keeps memory by stream."""
        if self.decoder.device_id is not None and self._stream is None:
            self._stream = torch.cuda.Stream(self.decoder.device_id)
        return self._stream

    def _neighbour(self, read: Read, number: int, plan: BatchPlan, row: int) -> tuple[np.ndarray, BatchPlan]:
        """Return the bytes of the next readable image, and the plan with it in the place of the bad one."""
        bad = int(plan.sample_ids[row])
        for ahead in range(1, len(self.index)):
            image = (bad + ahead) % len(self.index)
            one = self.replan(number, int(plan.positions[row]), image)
            try:
                encoded, _ = read(image)
                self.decoder.decode([encoded], one)
            except BadImage as error:
                self._note(image, error)
                continue
            return encoded, plan.with_row(row, one)
        raise RunError(f"no image of {self.index.root} can be read any more: {_listed(self.bad_images)}")

    def _name_damaged(self, encoded: list[np.ndarray], plan: BatchPlan) -> None:
        """Say once which images of the batch just decoded are damaged, yet were decoded.

        When decoders complained more often than there are damaged images known, the others are decoded one by one.
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
        name = self.index.name(image)
        if name in self.bad_images:
            return
        if problem := folder_problem(self.index.root):
            raise RunError(
                f"{problem} any more; mount or restore it, the same command goes on from the last checkpoint"
            )
        self.bad_images[name] = str(error)
        if self.on_bad_image == "stop":
            raise RunError(f"bad image {self.index.root}/{name}: {error}; data.on_bad_image is 'stop'")
        log.warning("bad image %s/%s: %s; another takes its place", self.index.root, name, error)
        self.check(self.bad_images)

    def check(self, found: dict[str, str]) -> None:
        """Raise RunError, with the list, when more images were found bad than the limit allows."""
        if len(found) > self.allowed:
            raise RunError(
                f"{len(found)} images turned bad after indexing, more than data.bad_image_limit allows "
                f"({self.limit:g} of {len(self.index)} images: {self.allowed}); restore them, or start a new run "
                f"(another --out), whose index leaves them out: {_listed(found)}"
            )


def _no_image_is_bad(number: int, failure: BadImage) -> RunError:
    return RunError(
        f"batch {number} {failure}, although each of its images alone can, perhaps for lack of memory; choose a "
        "smaller engine.micro_batch or fewer data.threads"
    )


def _listed(found: dict[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in list(found.items())[:SHOWN]]
    more = len(found) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")


def to_torch(
    images, labels: np.ndarray, patches: list[tuple[tuple, np.ndarray]], stream: torch.cuda.Stream | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """DALI's dense float32 tensor list, with `patches` (of `erasing_noise`) written over it, and int64 labels as
    torch tensors, complete when this returns.

    On the CPU nothing is copied: DALI's default executor leaves an output to whoever refers to it. On the GPU
    the copy is made and waited for on `stream`; the consumer's stream is recorded in `Stream`.
    """
    if stream is None:
        return _pinned(erase(torch.from_dlpack(images.as_tensor()), patches)), _pinned(torch.from_numpy(labels))
    with torch.cuda.stream(stream):
        tensors = (
            erase(torch.from_dlpack(images.as_tensor()).clone(), patches),
            torch.from_numpy(labels).to(stream.device),
        )
    stream.synchronize()
    return tensors


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """In page-locked memory when there is a GPU, so that its copy to the GPU need not be waited for."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
