"""Run tasks in several processes, in order, with a progress bar on a terminal; Ctrl-C and a dead parent end them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Progress = bool | Callable[[int, int], None]

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(
    title: str,
    function: Callable[[Task], Result],
    tasks: list[Task],
    counts: list[int],
    *,
    workers: int | None,
    progress: Progress,
) -> list[Result]:
    """Return the results of `function` over `tasks`, in order, from `workers` processes (default: one per core, at most
    16).

    `counts` are the images or shards of each task; `progress` shows a bar on a terminal, or is called with
    (done, total).
    """
    done, total = 0, sum(counts)
    results: list[Result] = []

    def collect(advance: Callable[[int, int], None]) -> None:
        nonlocal done
        for result, count in zip(_in_processes(function, tasks, workers), counts, strict=True):
            results.append(result)
            done += count
            advance(done, total)

    if callable(progress):
        collect(progress)
    elif progress and total > 1 and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total)
            collect(lambda done, _: bar.update(task, completed=done))
    else:
        collect(lambda done, total: None)
    return results


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(function: Callable[[Task], Result], tasks: list[Task], workers: int | None) -> Iterator[Result]:
    if workers is None:
        workers = min(16, available_cores())
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent) as pool:
        try:
            # Ctrl-C in a terminal would reach the workers too; they start with it blocked, and this process ends them.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                results = deque(pool.submit(function, task) for task in tasks)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            while results:
                yield results.popleft().result()
        except KeyboardInterrupt:  # cancels nothing: the pool's own thread fails on cancelled tasks of killed workers
            for worker in multiprocessing.active_children():
                worker.kill()
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """End this process when its parent is gone, for example killed: it would wait for work forever."""

    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
