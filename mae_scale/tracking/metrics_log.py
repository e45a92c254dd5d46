"""metrics.jsonl: one JSON object per logged step, by rank 0, with or without MLflow; no step twice after a resume."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.files import write_atomically

logger = logging.getLogger(__name__)

# JSON has no such numbers: they are written as text, and read_metrics makes them floats again.
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


WARM_UP_SHARE = 0.2
"""Share of a start's steps, the first ones, that its rates are measured without."""


def parse_rows(content: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each complete line of `content` and its row; None where the line is not a row."""
    *lines, _torn = content.split(b"\n")
    for line in lines:
        try:
            row = json.loads(line)
            row["step"], row["time"] = int(row["step"]), float(row["time"])
        except (ValueError, KeyError, TypeError):
            yield line, None
        else:
            yield line, {k: NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, by step; non-finite values are floats again.

    A missing file has no rows; a torn last line (a run is writing, or died) is left out.
    """
    path = Path(path)
    if not path.exists():
        return []
    return [row for _, row in parse_rows(path.read_bytes()) if row is not None]


def after_warm_up(rows: Sequence[Mapping[str, Any]], start: int = 0) -> list[Mapping[str, Any]]:
    """Return the rows after step `start` whose rates are of steps behind the first WARM_UP_SHARE of them."""
    own = [row for row in rows if row["step"] > start]
    warm = start + WARM_UP_SHARE * (own[-1]["step"] - start) if own else 0
    return [row for before, row in pairwise(own) if before["step"] >= warm]


class MetricsLog:
    """Writer of a run's metrics.jsonl, step by step. Only rank 0 opens it.

    A row has step, epoch (epochs done, with the fraction), time (unix seconds when logged) and the metrics by
    name: train/loss, train/lr, train/grad_norm, perf/images_per_second, perf/step_time_s, perf/data_wait_s,
    perf/mfu, memory/peak_gib. Values that are not finite are written as "NaN", "Infinity" or "-Infinity".
    """

    def __init__(self, path: Path, resume_step: int = 0):
        """Open for a run that resumes after `resume_step` (0: from the start).

        Drops rows with a greater step, from a run that died past its last checkpoint, and a torn last line; both
        atomically. Raises OSError when the file cannot be read or written.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open(resume_step)

    def _open(self, resume_step: int) -> FileIO:
        """Drop the rows after `resume_step`, and open the file to append."""
        self.last_step = 0
        content = self.path.read_bytes() if self.path.exists() else b""
        kept = b"".join(self._kept_lines(content, resume_step))
        if kept != content:
            write_atomically(self.path, kept)
        return open(self.path, "ab", buffering=0)

    def rewind(self, step: int) -> None:
        """Continue after an earlier step: drop the rows behind it, as when a run is resumed."""
        self.close()
        self._file = self._open(step)

    def _kept_lines(self, content: bytes, resume_step: int) -> Iterator[bytes]:
        for number, (line, row) in enumerate(parse_rows(content), start=1):
            if row is None:
                logger.warning("%s: line %d is damaged and was dropped", self.path, number)
            elif self.last_step < row["step"] <= resume_step:
                self.last_step = row["step"]
                yield line + b"\n"

    def append(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Write one row to the operating system, so that it outlives this process.

        Raises ValueError when `step` is not greater than the last one (a programming error), OSError when the
        disk refuses.
        """
        if step <= self.last_step:
            raise ValueError(f"{self.path} has step {self.last_step}; step {step} cannot come after it")
        row = {"step": int(step), "epoch": _json_number(epoch), "time": round(time.time(), 3)}
        row.update((name, _json_number(value)) for name, value in metrics.items())
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self.last_step = int(step)

    def sync(self) -> None:
        """Wait until the rows are on the disk; call it before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close the file."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _json_number(value: float) -> float | int | str:
    """Return a number for JSON, which has no non-finite ones: these as text."""
    if isinstance(value, int):
        return int(value)
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
