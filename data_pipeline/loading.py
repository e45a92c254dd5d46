"""Plans to tensors in a background thread, for both loaders: read, decode, replace bad images, erase, queue."""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from data_pipeline.headers import BadImage
from data_pipeline.index import Index
from data_pipeline.order import BatchPlan, erasing_noise
from data_pipeline.pipelines import Decoder
from data_pipeline.reading import ByteReader
from mae_scale.errors import RunError

SHOWN = 20  # bad images listed when a run stops
POLL_S = 0.1

log = logging.getLogger("mae_scale.data")


@dataclass
class Batch:
    """A micro-batch of n images.

    `images` float32 [n, 3, S, S], normalised by ImageNet's mean and std, then erased in boxes where that was
    drawn, on the GPU that decoded them or on the CPU (pinned when there is a GPU); `labels` int64 [n] on the
    same device, -1 without a label;
    `sample_ids` int64 [n] (NumPy), rows of the index, those of the replacements where images were bad;
    `positions` int64 [n] (NumPy) in the global batch; `valid` bool [n] (NumPy), False for filling and for bad
    images of an evaluation; `step` the number of the batch; `replaced` how many of the n were bad; `drawn` what else
    was drawn for these positions, on the host (pinned when there is a GPU).
    """

    images: torch.Tensor
    labels: torch.Tensor
    sample_ids: np.ndarray
    positions: np.ndarray
    valid: np.ndarray
    step: int
    replaced: int
    drawn: tuple[torch.Tensor, ...] = ()


class Loading:
    """Turns plans into batches, replacing images that cannot be read or decoded by the next readable ones.

    `replan(step, position, sample_id)` gives the one-row plan of another image in that place, with the same
    random numbers; `seed` is for the noise of random erasing; `draw(step, positions)` gives `Batch.drawn`. Whether an
    image is bad is judged anew each time,
    so that a batch depends on the files alone and not on what this process met before. `bad_images` maps each bad
    name met so far to its reason.
    """

    def __init__(
        self,
        index: Index,
        decoder: Decoder,
        replan: Callable[[int, int, int], BatchPlan],
        draw: Callable[[int, np.ndarray], tuple[torch.Tensor, ...]],
        *,
        seed: int,
        threads: int,
        limit: float,
        on_bad_image: Literal["replace", "stop"],
        invalidate: bool = False,
    ):
        self.index, self.decoder, self.replan, self.draw = index, decoder, replan, draw
        self.seed, self.threads, self.on_bad_image, self.invalidate = seed, threads, on_bad_image, invalidate
        self.allowed = max(1, int(limit * len(index)))
        self.limit = limit
        self.bad_images: dict[str, str] = {}
        self._stream: torch.cuda.Stream | None = None

    def batches(self, plans: Iterator[tuple[int, BatchPlan]]) -> Iterator[Batch]:
        """One batch a (step, plan); the bytes of the next plan are read while this one's are decoded."""
        reader = ByteReader(self.index)
        with ThreadPoolExecutor(self.threads, thread_name_prefix="mae-scale-read") as pool:
            waiting: list[tuple[int, BatchPlan, list[Future]]] = []
            try:
                for step, plan in plans:
                    reads = [pool.submit(reader.read, int(image)) for image in plan.sample_ids]
                    waiting.append((step, plan, reads))
                    if len(waiting) > 1:
                        yield self._finish(reader, *waiting.pop(0))
                for step, plan, reads in waiting:
                    yield self._finish(reader, step, plan, reads)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _finish(self, reader: ByteReader, step: int, plan: BatchPlan, reads: list[Future]) -> Batch:
        encoded: list[np.ndarray] = [None] * len(plan)
        replaced: set[int] = set()

        def put_another(row: int, error: BadImage) -> None:
            nonlocal plan
            self._note(int(plan.sample_ids[row]), error)
            encoded[row], plan = self._neighbour(reader, step, plan, row)
            replaced.add(row)

        for row, read in enumerate(reads):
            try:
                encoded[row] = read.result()
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
                raise _no_image_is_bad(step, failure) from failure
            try:
                images = self.decoder.decode(encoded, plan)
            except BadImage as again:
                raise _no_image_is_bad(step, again) from again
        valid = plan.valid.copy()
        if self.invalidate:
            valid[list(replaced)] = False
        labels = self.index.label[plan.sample_ids].astype(np.int64)
        if self.decoder.device_id is not None and self._stream is None:
            self._stream = torch.cuda.Stream(self.decoder.device_id)  # one: the allocator keeps memory by stream
        patches = erasing_noise(plan, seed=self.seed, step=step)
        tensors = to_torch(images, labels, patches, self._stream)
        drawn = tuple(_pinned(tensor) for tensor in self.draw(step, plan.positions))
        return Batch(*tensors, plan.sample_ids, plan.positions, valid, step, len(replaced), drawn)

    def _neighbour(self, reader: ByteReader, step: int, plan: BatchPlan, row: int) -> tuple[np.ndarray, BatchPlan]:
        """The bytes of the next readable image, and the plan with it in the place of the bad one."""
        bad = int(plan.sample_ids[row])
        for ahead in range(1, len(self.index)):
            image = (bad + ahead) % len(self.index)
            one = self.replan(step, int(plan.positions[row]), image)
            try:
                encoded = reader.read(image)
                self.decoder.decode([encoded], one)
            except BadImage as error:
                self._note(image, error)
                continue
            columns = {name: column.copy() for name, column in vars(plan).items() if name != "valid"}
            for name, column in columns.items():
                column[row] = getattr(one, name)[0]
            return encoded, replace(plan, **columns)
        raise RunError(f"no image of {self.index.root} can be read any more: {_listed(self.bad_images)}")

    def _note(self, image: int, error: BadImage) -> None:
        name = self.index.name(image)
        if name in self.bad_images:
            return
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


def _no_image_is_bad(step: int, failure: BadImage) -> RunError:
    return RunError(
        f"step {step}: a batch {failure}, although each of its images alone can, perhaps for lack of memory; choose "
        "a smaller engine.micro_batch or fewer data.threads"
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
        return _pinned(_erased(torch.from_dlpack(images.as_tensor()), patches)), _pinned(torch.from_numpy(labels))
    with torch.cuda.stream(stream):
        tensors = (
            _erased(torch.from_dlpack(images.as_tensor()).clone(), patches),
            torch.from_numpy(labels).to(stream.device),
        )
    stream.synchronize()
    return tensors


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """In page-locked memory when there is a GPU, so that its copy to the GPU need not be waited for."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def _erased(images: torch.Tensor, patches: list[tuple[tuple, np.ndarray]]) -> torch.Tensor:
    for place, noise in patches:
        images[place] = torch.from_numpy(noise)
    return images


class Stream:
    """Runs an iterator of batches in a thread, `prefetch` batches ahead, and hands them to one consumer."""

    def __init__(self, batches: Iterator[Batch], prefetch: int):
        self._queue: queue.Queue = queue.Queue(max(1, prefetch))
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_produce, args=(batches, self._queue, self._stop), name="mae-scale-loader", daemon=True
        )
        self._thread.start()
        if not _running:
            # Functions registered last run first: DALI, imported by now, must not end its pipelines under a thread.
            atexit.unregister(_close_all)
            atexit.register(_close_all)
        _running.add(self)

    def __iter__(self) -> Iterator[Batch]:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=1)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    raise RunError("the loader's thread has ended without a word") from None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            if item.images.is_cuda:
                item.images.record_stream(torch.cuda.current_stream(item.images.device))
                item.labels.record_stream(torch.cuda.current_stream(item.labels.device))
            yield item

    def close(self) -> None:
        """Stop and wait for the thread, which finishes at most the batch that it is decoding."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        _running.discard(self)


_running: weakref.WeakSet[Stream] = weakref.WeakSet()


def _close_all() -> None:
    for stream in list(_running):
        stream.close()


def _produce(batches: Iterator[Batch], into: queue.Queue, stop: threading.Event) -> None:
    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return into.put(item, timeout=POLL_S)
            except queue.Full:
                continue

    try:
        for batch in batches:
            put(batch)
            if stop.is_set():
                break
        put(None)
    except BaseException as error:  # whatever it is, the consumer must not wait for ever
        put(error)
    finally:
        batches.close()
