"""A training run on a cluster as events: what units compute, what a network and a storage serve one after the other.

A unit is what computes in lock-step: a node with a GPU per rank, or a rank that shares a CPU's cores with others.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Then = Callable[[], None]


class Events:
    """Events in the order of their time, each a function that is called then."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Then]] = []
        self._numbers = itertools.count()

    def after(self, seconds: float, then: Then) -> None:
        """Call a function after so many seconds."""
        heapq.heappush(self._queue, (self.now + seconds, next(self._numbers), then))

    def run(self) -> None:
        """Go from event to event until none is left."""
        while self._queue:
            self.now, _, then = heapq.heappop(self._queue)
            then()


class Line:
    """What serves one request after the other: a network in collectives, a storage."""

    def __init__(self, events: Events):
        self._events, self._free_at = events, 0.0

    def serve(self, seconds: float, then: Then) -> None:
        """Serve a request that takes so long, after those before it; then call a function."""
        self._free_at = max(self._free_at, self._events.now) + seconds
        self._events.after(self._free_at - self._events.now, then)


class Cores:
    """Cores that work shares equally, none with more than one of them."""

    def __init__(self, events: Events, count: int):
        self._events, self._count = events, count
        self._left: dict[int, tuple[float, Then]] = {}
        self._numbers, self._since, self._planned = itertools.count(), 0.0, 0

    def work(self, seconds: float, then: Then) -> None:
        """Do work that takes so long on a core of its own; then call a function."""
        self._advance()
        self._left[next(self._numbers)] = (seconds, then)
        self._plan()

    def _rate(self) -> float:
        return min(1.0, self._count / len(self._left))

    def _advance(self) -> None:
        if self._left:
            done = (self._events.now - self._since) * self._rate()
            self._left = {number: (left - done, then) for number, (left, then) in self._left.items()}
        self._since = self._events.now

    def _plan(self) -> None:
        """Plan the next end of work; what was planned before is void."""
        self._planned += 1
        if self._left:
            planned, first = self._planned, min(self._left, key=lambda number: self._left[number][0])
            left = max(0.0, self._left[first][0])
            self._events.after(left / self._rate(), lambda: self._end(first) if planned == self._planned else None)

    def _end(self, number: int) -> None:
        self._advance()
        _, then = self._left.pop(number)
        self._plan()
        then()


@dataclass(frozen=True)
class Conditions:
    """What formulas leave out. Shares are standard deviations of a logarithm."""

    jitter: float = 0.0
    """Of a rank's computing, from step to step."""
    spread: float = 0.0
    """Between the GPUs, for the whole run."""
    storage_bytes_per_s: float = float("inf")
    read_ahead: int = 4
    """Steps whose images a unit asks the storage for ahead of computing."""


@dataclass(frozen=True)
class Work:
    """A step, as each unit does it; seconds, bytes."""

    units: int
    ranks_per_unit: int
    forward_s: float
    backward_s: float
    """Of a micro-batch, like forward_s."""
    passes: int
    """Micro-batches."""
    buckets: int
    """Of gradients, ready one after the other in a backward pass."""
    reduce_s: float
    """To reduce a bucket over all ranks."""
    overlaps: bool
    """Whether buckets are reduced as soon as they are ready, in each pass; else after the last backward pass.

    The next pass begins when all of this one are reduced.
    """
    optimizer_s: float
    gather_s: float
    """To gather the weights after the optimiser."""
    batch_bytes: float
    """Of a unit's images of a step."""
    checkpoint_steps: int | None = None
    checkpoint_stall_s: float = 0.0
    checkpoint_bytes: float = 0.0
    """Written by each unit, while training goes on."""

    @property
    def compute_s(self) -> float:
        """Seconds of all passes."""
        return self.passes * (self.forward_s + self.backward_s)


@dataclass(frozen=True)
class Steps:
    """Mean seconds of a step, and of its parts."""

    step: float
    compute: float
    stragglers: float
    communication: float
    optimizer: float
    data: float
    checkpoint: float


class Training:
    """A run of some steps on units that meet at every step."""

    def __init__(
        self, work: Work, conditions: Conditions, *, steps: int, seed: int, cores: int | None = None, warm_up: int = 5
    ):
        """cores: of a machine whose units are ranks; None: each unit computes by itself."""
        self.events = Events()
        self._work, self._conditions, self._steps, self._warm_up = work, conditions, steps + warm_up, warm_up
        self._network, self._storage = Line(self.events), Line(self.events)
        self._cores = None if cores is None else Cores(self.events, cores)
        self._random = np.random.default_rng(seed)
        self._speed = np.exp(conditions.spread * self._random.standard_normal((work.units, work.ranks_per_unit)))
        self._batches, self._waits = [0] * work.units, [False] * work.units
        self._step = 0
        self._rows: list[list[float]] = []

    def run(self) -> Steps:
        """Run the steps; return their means, without those of the warm-up."""
        for unit in range(self._work.units):
            for _ in range(self._conditions.read_ahead):
                self._read(unit)
        self._begin()
        self.events.run()
        means = np.mean(self._rows[self._warm_up :], axis=0).tolist()
        return Steps(*means)

    def _read(self, unit: int) -> None:
        seconds = self._work.batch_bytes / self._conditions.storage_bytes_per_s
        self._storage.serve(seconds, lambda: self._arrive(unit))

    def _arrive(self, unit: int) -> None:
        self._batches[unit] += 1
        if self._waits[unit]:
            self._waits[unit] = False
            self._compute(unit)

    def _begin(self) -> None:
        """Begin a step: each unit computes once it has its images."""
        work = self._work
        self._began, self._last_start, self._computed, self._reduced = self.events.now, self.events.now, 0, 0
        self._ready = [0] * (work.passes * work.buckets)
        self._held: list[Then] = []
        self._held_s = 0.0
        jitter = np.exp(self._conditions.jitter * self._random.standard_normal(self._speed.shape))
        self._slowness = (self._speed * jitter).max(axis=1)
        for unit in range(work.units):
            if self._batches[unit]:
                self._compute(unit)
            else:
                self._waits[unit] = True

    def _compute(self, unit: int) -> None:
        work, slow = self._work, float(self._slowness[unit])
        self._batches[unit] -= 1
        self._read(unit)
        self._last_start = self.events.now
        part = work.backward_s / work.buckets
        parts = [work.forward_s * (number == 0) + part for _ in range(work.passes) for number in range(work.buckets)]

        def go_on(number: int) -> None:
            if number:
                self._bucket(number - 1)
            if number == len(parts):
                self._end_of_compute()
            elif number and number % work.buckets == 0 and work.overlaps:
                self._held.append(lambda: compute(number))
            else:
                compute(number)

        def compute(number: int) -> None:
            do = self.events.after if self._cores is None else self._cores.work
            do(slow * parts[number], lambda: go_on(number + 1))

        compute(0)

    def _bucket(self, number: int) -> None:
        """Note that a unit has a bucket ready; the last one lets it be reduced."""
        self._ready[number] += 1
        self._last_ready = self.events.now
        if self._work.overlaps and self._ready[number] == self._work.units:
            self._network.serve(self._work.reduce_s, self._end_of_reduce)

    def _end_of_compute(self) -> None:
        self._computed += 1
        if self._computed == self._work.units:
            self._compute_ended = self.events.now
            if not self._work.overlaps:
                for _ in range(self._work.buckets):
                    self._network.serve(self._work.reduce_s, self._end_of_reduce)

    def _end_of_reduce(self) -> None:
        self._reduced += 1
        if self._held and self._reduced % self._work.buckets == 0:
            self._held_s += self.events.now - self._last_ready
            held, self._held = self._held, []
            for then in held:
                then()
        if self._reduced == self._work.buckets * (self._work.passes if self._work.overlaps else 1):
            self.events.after(
                self._work.optimizer_s, lambda: self._network.serve(self._work.gather_s, self._end_of_step)
            )

    def _end_of_step(self) -> None:
        work, now = self._work, self.events.now
        self._step += 1
        stall = 0.0
        if work.checkpoint_steps and self._step % work.checkpoint_steps == 0:
            stall = work.checkpoint_stall_s
            for _ in range(work.units):
                self._storage.serve(work.checkpoint_bytes / self._conditions.storage_bytes_per_s, lambda: None)
        waited = self._last_start - self._began
        slow = self._compute_ended - self._last_start - work.compute_s - self._held_s
        exposed = now - self._compute_ended - work.optimizer_s + self._held_s
        total = now - self._began + stall
        self._rows.append([total, work.compute_s, slow, exposed, work.optimizer_s, waited, stall])
        if self._step < self._steps:
            self.events.after(stall, self._begin)


def share_lost_to_failures(
    *, mtbf_s: float, interval_s: float, stall_s: float, write_s: float, restart_s: float, failures: int, seed: int
) -> float:
    """Return the share of a run's time that is not work, over so many failures at random times.

    Saved is what has been written in whole; a save holds training for its stall and is written beside it.
    """
    random, now, work, saved = np.random.default_rng(seed), 0.0, 0.0, 0.0
    for _ in range(failures):
        fails_at = now + random.exponential(mtbf_s)
        written: list[tuple[float, float]] = []
        while True:
            until = now + interval_s
            if until + stall_s >= fails_at:
                break
            now, work = until + stall_s, work + interval_s
            written.append((now + write_s, work))
        saved = max([saved, *(amount for at, amount in written if at <= fails_at)])
        now, work = fails_at + restart_s, saved
    return 1 - saved / now
