"""Read images ahead of their use, with as many reads in flight as their latency requires."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

TARGET_IMAGES_PER_S = 4000  # per rank: more than twice the 1,450 of ViT-H that an H100 is expected to train on
LEAST_IN_FLIGHT, MOST_IN_FLIGHT = 4, 128
RECENT = 64  # number of reads whose latency is averaged

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Threads that call `read(image)` in the order of submission, at most `in_flight` at a time.

    `in_flight` follows Little's law: mean seconds of the recent reads x TARGET_IMAGES_PER_S, between `least` and
    `most`. So reads from the page cache need few threads, and reads over a network overlap enough. A thread is
    started when a read waits for one, and then kept until `close`.
    """

    def __init__(self, read: Callable[[int], T], *, least: int = LEAST_IN_FLIGHT, most: int = MOST_IN_FLIGHT):
        self._read, self._least, self._most = read, least, most
        self.in_flight = least
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="mae-scale-read")
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, Future[T]]] = deque()
        self._active = 0
        self._recent_s: deque[float] = deque(maxlen=RECENT)

    def submit(self, image: int) -> Future[T]:
        """Submit the reading of `image`; the future gives what `read` returns or raises."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting.append((image, future))
            self._start_threads()
        return future

    def close(self) -> None:
        """Cancel the reads that have not begun, and wait for the others."""
        with self._lock:
            while self._waiting:
                self._waiting.popleft()[1].cancel()
        self._pool.shutdown()

    def __enter__(self) -> ReadAhead[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_threads(self) -> None:
        if self._waiting and self._active < self.in_flight:
            try:
                self._pool.submit(self._work)
            except RuntimeError:  # the interpreter is ending: the threads that run read the rest
                if not self._active:
                    raise
            else:
                self._active += 1

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or self._active > self.in_flight:
                    self._active -= 1
                    return
                image, future = self._waiting.popleft()
            began = time.perf_counter()
            try:
                found = self._read(image)
            except BaseException as error:  # raised where the image is used
                future.set_exception(error)
            else:
                future.set_result(found)
            self._adapt(time.perf_counter() - began)

    def _adapt(self, seconds: float) -> None:
        with self._lock:
            # A single stalled read must not decide: above this value the limit is reached anyway.
            self._recent_s.append(min(seconds, self._most / TARGET_IMAGES_PER_S))
            wanted = TARGET_IMAGES_PER_S * sum(self._recent_s) / len(self._recent_s)
            self.in_flight = round(min(max(wanted, self._least), self._most))
            self._start_threads()
