"""Make batches in a background thread, ahead of the consumer; the interpreter waits for it when it ends."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Generator, Iterator

import torch

from data_pipeline.batches import Batch
from data_pipeline.errors import RunError

POLL_S = 0.1

Item = Batch | BaseException | None  # None: the end


class Stream:
    """A thread that makes batches, `prefetch` ahead of its one consumer."""

    def __init__(self, batches: Generator[Batch], prefetch: int):
        self._queue: queue.Queue[Item] = queue.Queue(max(1, prefetch))
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
                    raise RunError(
                        "the loader's thread has ended without an error; run the same command again"
                    ) from None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            if item.images.is_cuda:
                for tensor in (item.images, item.labels, item.second):
                    if tensor is not None:
                        tensor.record_stream(torch.cuda.current_stream(tensor.device))
            yield item

    def close(self) -> None:
        """Stop the thread and wait for it; it finishes at most the batch that it is decoding."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        _running.discard(self)


_running: weakref.WeakSet[Stream] = weakref.WeakSet()


def _close_all() -> None:
    for stream in list(_running):
        stream.close()


def _produce(batches: Generator[Batch], into: queue.Queue[Item], stop: threading.Event) -> None:
    def put(item: Item) -> None:
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
    except BaseException as error:  # whatever it is: the consumer must not wait forever
        put(error)
    finally:
        batches.close()
