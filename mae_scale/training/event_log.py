"""events.jsonl: the events of a run beside its steps: starts and their ends, skipped steps, rollbacks, warnings.

Every start has one event that closes it: `stop` (a signal), `end` (done, stopped early, nothing to do) or `failure`;
one that has none was killed.

A line is appended by rank 0 and on the disk before the run goes on. The stretches of data that the run has skipped
are part of what it computes, so every start reads them from here.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data_pipeline.errors import RunError, UsageError
from mae_scale.distributed.collectives import from_first
from mae_scale.tracking.metrics_log import parse_rows

log = logging.getLogger("mae_scale")

CLOSING = ("stop", "end", "failure")


class Events:
    """The events of a run. Every rank makes one; all ranks call its methods at the same steps."""

    def __init__(self, path: Path):
        self.path = path
        self._writes = torch.distributed.get_rank() == 0
        self._is_open = False
        self._rows = from_first(lambda: _rows_of(path))

    def add(self, event: str, step: int, **facts: Any) -> None:
        """Note an event after `step` updates: start, skipped_step, rollback, warning, stop, end or failure.

        A warning changes nothing that is computed: rank 0 alone may note one.
        """
        row = {"step": step, "event": event, "time": round(time.time(), 3), **facts}
        self._rows.append(row)
        self._is_open = event not in CLOSING and (self._is_open or event == "start")
        if self._writes:
            with open(self.path, "a+b") as file:
                if file.tell() and not _ends_with_newline(file):
                    file.write(b"\n")  # a start before this one died while it wrote
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())

    def fail(self, step: int, error: BaseException) -> None:
        """Note why this start has failed, on rank 0 and unless it was closed before. Any rank alone may call it."""
        if not self._is_open:
            return
        explained = isinstance(error, (UsageError, RunError))
        try:
            self.add("failure", step, reason=str(error) if explained else f"{type(error).__name__}: {error}")
        except OSError as full:
            log.warning("%s: why the run failed could not be noted: %s", self.path, full.strerror)

    def all(self, event: str) -> list[dict[str, Any]]:
        """Return what was noted of an event in the whole run, over all its starts."""
        return [row for row in self._rows if row["event"] == event]

    def count(self, event: str) -> int:
        """Return how often it has happened in the whole run, over all its starts."""
        return len(self.all(event))

    def batch_of(self, step: int) -> int:
        """Return the number of the global batch that update `step` (from 0) takes: the step plus what was skipped."""
        return step + sum(
            row["skipped_batches"] for row in self._rows if row["event"] == "rollback" and row["step"] <= step
        )


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of an events.jsonl; none when there is no file."""
    return [row for _, row in parse_rows(path.read_bytes()) if row] if path.exists() else []


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
