"""The content of a page about runs, as those who read runs fill it in and the page shows it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Values of a metric by ascending epoch; NaN where a value is not finite."""

    epochs: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Event:
    """Something that has happened to a run."""

    time: float | None
    """Unix seconds."""
    step: int
    kind: str
    """start, stop, end, failure, warning, rollback, skipped_step, or killed: a start that has no end."""
    words: str


@dataclass(frozen=True)
class PageRun:
    """What the page shows of a run; empty or None where it is not known."""

    name: str
    kind: str
    """Of training: pretrain, probe, ..."""
    encoder: str
    seed: int | None
    epochs_done: float | None
    epochs: int | None
    """Length of the schedule."""
    state: str
    """done, running, stopped, stopped early, failed, killed, not started."""
    reason: str = ""
    """Why it has failed or stopped."""
    values: Mapping[str, float] = field(default_factory=dict)
    """The last value of each metric, by name."""
    duration_s: float | None = None
    """Of all starts together."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    events: Sequence[Event] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, str] = field(default_factory=dict)
    """section.key to its value."""
    notes: Sequence[str] = ()
    """What is wrong with its files."""


@dataclass(frozen=True)
class Picture:
    """A picture in the page."""

    title: str
    content: bytes
    media_type: str
    """image/png or image/webp."""
    size: tuple[int, int]
    """Width and height in pixels."""
    alt: str


@dataclass(frozen=True)
class Page:
    """All that the page shows."""

    title: str
    source: str
    """Where the runs were read."""
    version: str
    """Of mae-scale."""
    runs: Sequence[PageRun]
    figures: Sequence[Picture] = ()
    """Figures of the runs together, such as throughput against ranks."""
    reconstructions: Sequence[Picture] = ()
    notes: Sequence[str] = ()
    made_at: float = field(default_factory=time.time)
