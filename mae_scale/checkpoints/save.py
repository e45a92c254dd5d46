"""Saving in the background: training waits for the copy to host memory, a thread does the rest.

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
from mae_scale.distributed.collectives import from_all

log = logging.getLogger("mae_scale")

RETRY_S = 60.0
FAILURES_ALLOWED = 2
ALLOWED_SKEW = 2
"""Allowed skew between ranks' writes, in collective timeouts."""


@dataclass(frozen=True)
class SaveTimes:
    """Cost of a save in seconds: training stood still for `stall_s`, the checkpoint was whole after `total_s`."""

    step: int
    stall_s: float
    total_s: float


class Saver:
    """Writer of a run's checkpoints. Every rank makes one and calls its methods at the same steps."""

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
        self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=ALLOWED_SKEW * timeout_s))
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
        """Begin to write the checkpoint of step facts["step"]; wait for the save before it.

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
        """Wait for the save under way; return whether the last one succeeded (or there was none).

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
        """Return whether the save under way has failed on this rank; when it has on any, all must call wait()."""
        return self._thread is not None and not self.is_writing() and self._error is not None

    def retry_is_due(self) -> bool:
        """Return True on rank 0 when a failed save is due again; all ranks then agree on a step to save at."""
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def _on_the_host(self, own: list[Piece]) -> list[Piece]:
        """Return copies of the pieces in host memory, which the next save reuses (pinned where there is a GPU)."""
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
        """Write the checkpoint, in the thread; return what went wrong, the same on every rank, or None.

        Raises RuntimeError (Gloo's) when a rank is lost.
        """
        step = manifest["step"]
        place, beside = folder_of(self._checkpoints, step), partial_folder_of(self._checkpoints, step)
        try:
            self._on_first(lambda: self._make_room(beside))
            files = from_all(lambda: self._write_part(beside, pieces), self._group)
            self._on_first(lambda: self._finish(beside, place, manifest, files))
        except RunError as failure:
            if self._rank == 0:
                with contextlib.suppress(OSError):
                    shutil.rmtree(beside)
            return str(failure)
        return None

    def _on_first(self, work: Callable[[], None]) -> None:
        """Do work on rank 0, and wait for it on the others; raise RunError on all ranks where it fails."""
        from_all(work if self._rank == 0 else lambda: None, self._group)

    def _make_room(self, beside: Path) -> None:
        """Remove what unfinished saves have left, and make the folder to write into."""
        for leftover in partial_folders(self._checkpoints):
            shutil.rmtree(leftover)
        beside.mkdir(parents=True)

    def _write_part(self, beside: Path, pieces: list[Piece]) -> dict[str, Any]:
        """Write this rank's file; return its size and digest."""
        beside.mkdir(parents=True, exist_ok=True)  # a node may not see yet what another has made
        return write_shard(beside / _file_of(self._rank), pieces)

    def _finish(self, beside: Path, place: Path, manifest: dict[str, Any], files: list[dict[str, Any]]) -> None:
        """Write the manifest, give the checkpoint its name, and remove those that are no longer kept."""
        write_manifest(beside, manifest, {_file_of(rank): file for rank, file in enumerate(files)})
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


def _file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _on_cpu(piece: Piece) -> Piece:
    return Piece(piece.name, piece.start, piece.data.cpu())
