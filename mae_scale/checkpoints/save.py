"""Saving while training goes on: training waits for the copy to host memory, a thread does the rest.

The thread of each rank writes its file; the threads then meet on a process group of their own, rank 0 writes the
manifest and gives the checkpoint its name, and all learn the same outcome: written, or why not.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import RunError
from data_pipeline.files import sync
from mae_scale.checkpoints.shards import EngineState, Piece, write_shard
from mae_scale.checkpoints.store import (
    Retention,
    beyond,
    folder_of,
    partial_folder_of,
    partial_folders,
    remove,
    write_manifest,
)

log = logging.getLogger("mae_scale")

RETRY_S = 60.0
FAILURES_ALLOWED = 2
SLOWER = 2
"""A rank may be so many collective timeouts later with its file than another."""


@dataclass(frozen=True)
class SaveTimes:
    """What a save has cost, in seconds: training stood still for `stall_s`, the file was whole after `total_s`."""

    step: int
    stall_s: float
    total_s: float


class Saver:
    """Writes a run's checkpoints. Every rank makes one and calls its methods at the same steps."""

    def __init__(
        self,
        checkpoints: Path,
        retention: Retention,
        *,
        background: bool,
        timeout_s: float,
        guard: Callable[[], None] | None = None,
    ):
        """guard: called on rank 0 before a checkpoint gets its name; it ends a process that may no longer write."""
        self._checkpoints, self._retention, self._background = checkpoints, retention, background
        self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=SLOWER * timeout_s))
        self._rank, self._guard = torch.distributed.get_rank(), guard
        self._host: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._lost: RuntimeError | None = None
        self._failed_in_a_row = 0
        self._retry_at: float | None = None
        self._step: int | None = None
        self.times: list[SaveTimes] = []

    def save(self, state: EngineState, facts: dict[str, Any]) -> None:
        """Begin to write a checkpoint: facts["step"] says of which step. Waits for the save before it.

        Returns when the state may change again. Raises RunError after three failures in a row.
        """
        began = time.perf_counter()
        self.wait()
        pieces = self._on_the_host(state.own) if self._background else [_on_cpu(p) for p in state.own]
        self._step, self._error, self._retry_at = facts["step"], None, None
        manifest = {**facts, "scalars": state.scalars}

        def write() -> None:
            try:
                self._error = self._write(pieces, manifest)
            except RuntimeError as lost:
                self._lost, self._error = lost, "the ranks lost touch with each other"
            total = time.perf_counter() - began
            self.times.append(SaveTimes(facts["step"], copied if self._background else total, total))

        copied = time.perf_counter() - began
        self._thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        self._thread.start()
        if not self._background:
            self.wait()

    def wait(self) -> bool:
        """Wait until the save that is under way has ended; whether the last one has succeeded (or there was none).

        The same on every rank. Warns of a failure; raises RunError at the third in a row, and Gloo's own error when
        a rank is lost, which Control then explains.
        """
        if self._thread is None:
            return self._error is None
        self._thread.join()
        self._thread = None
        if self._lost is not None:
            raise self._lost
        if self._error is None:
            self._failed_in_a_row = 0
            return True
        self._failed_in_a_row += 1
        what = f"the checkpoint of step {self._step} could not be written: {self._error}"
        if self._failed_in_a_row > FAILURES_ALLOWED:
            raise RunError(
                f"{what}; {self._failed_in_a_row} times in a row now. The older checkpoints are as they were",
                on_all_ranks=True,
            )
        if self._rank == 0:
            log.warning("%s; the older checkpoints are as they were, training goes on and tries again", what)
            self._retry_at = time.monotonic() + RETRY_S
        return False

    def is_writing(self) -> bool:
        """Return whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def has_failed(self) -> bool:
        """Return whether the save under way has ended badly here; if so for any rank, all are to call wait()."""
        return self._thread is not None and not self.is_writing() and self._error is not None

    def retry_is_due(self) -> bool:
        """On rank 0: the last save failed and a while has passed; for all ranks to agree on a step to save at."""
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def _on_the_host(self, own: list[Piece]) -> list[Piece]:
        """Copies of the pieces in host memory that is used again by the next save (pinned where there is a GPU)."""
        copies = []
        for piece in own:
            key = f"{piece.name}@{piece.start}"
            if key not in self._host:
                pinned = piece.data.is_cuda
                self._host[key] = torch.empty(piece.data.shape, dtype=piece.data.dtype, pin_memory=pinned)
            self._host[key].copy_(piece.data, non_blocking=True)
            copies.append(Piece(piece.name, piece.start, self._host[key]))
        if any(piece.data.is_cuda for piece in own):
            torch.cuda.synchronize()
        return copies

    def _write(self, pieces: list[Piece], manifest: dict[str, Any]) -> str | None:
        """In the thread: the whole of a save; what went wrong, the same on every rank, or None.

        Raises RuntimeError (Gloo's) when a rank is lost.
        """
        step = manifest["step"]
        place, beside = folder_of(self._checkpoints, step), partial_folder_of(self._checkpoints, step)
        name = f"rank_{self._rank:05d}.safetensors"

        def make_room() -> None:
            for leftover in partial_folders(self._checkpoints):
                shutil.rmtree(leftover)
            beside.mkdir(parents=True)

        def write_part() -> dict[str, Any]:
            beside.mkdir(parents=True, exist_ok=True)  # a node may not see yet what another has made
            return write_shard(beside / name, pieces)

        def finish(files: list[dict[str, Any]]) -> None:
            names = [f"rank_{rank:05d}.safetensors" for rank in range(len(files))]
            write_manifest(beside, manifest, dict(zip(names, files, strict=True)))
            if self._guard is not None:
                self._guard()
            if place.exists():
                remove(place)
            beside.rename(place)
            sync(self._checkpoints)
            try:
                for old in beyond(self._checkpoints, self._retention):
                    remove(old)
            except OSError as error:  # the new one is whole all the same
                log.warning("%s could not be removed: %s", error.filename, error.strerror)

        error, _ = self._together(make_room if self._rank == 0 else lambda: None)
        if error is None:
            error, files = self._together(write_part)
        if error is None:
            error, _ = self._together((lambda: finish(files)) if self._rank == 0 else lambda: None)
        if error is not None and self._rank == 0:
            with contextlib.suppress(OSError):
                shutil.rmtree(beside)
        return error

    def _together(self, part: Callable) -> tuple[str | None, list]:
        """Do this rank's part; then (the first rank's error or None, all results), the same on every rank."""
        try:
            mine = (None, part())
        except OSError as error:
            mine = (f"{error.filename}: {error.strerror}", None)
        outcomes: list = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(outcomes, mine, group=self._group)
        errors = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(outcomes) if error]
        return (errors[0] if errors else None), [result for _, result in outcomes]


def _on_cpu(piece: Piece) -> Piece:
    return Piece(piece.name, piece.start, piece.data.cpu())
