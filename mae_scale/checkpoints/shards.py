"""A training state in pieces, and the files that hold them: any number of ranks writes, any other number reads.

A piece is a stretch of one flattened tensor of the state: elements [start, start + n) of PART/PARAMETER, for instance
`exp_avg/model.encoder.norm.weight`; the parts are weight, ema, momentum, buffer and the optimiser's. An engine says
which pieces its rank holds, so a checkpoint knows nothing of ZeRO stages, and a start on other ranks, or under another
stage or library, reads the stretches that it now needs.

Each file is in the safetensors layout (https://github.com/huggingface/safetensors), with keys `NAME@START`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_pipeline.errors import RunError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK_BYTES = 2**24
EMA = "ema"
"""Part of the state that holds the average of the weights, where one is kept."""
MOMENTUM = "momentum"
"""Part of the state that holds the average that a momentum encoder computes with, where one is kept."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + len(data)) of the tensor `name`, flattened; data is a view of the live state, [n]."""

    name: str
    start: int
    data: torch.Tensor


@dataclass(frozen=True)
class EngineState:
    """A rank's part of the training state.

    `pieces` are all that it reads when it resumes. `own` are those that it writes: of all ranks together, every
    element once. `scalars` are plain numbers that are the same on every rank.
    """

    pieces: list[Piece]
    own: list[Piece]
    scalars: dict[str, Any] = field(default_factory=dict)


def share_of(pieces: Sequence[Piece], rank: int, world_size: int) -> list[Piece]:
    """Return the pieces that a rank writes of those that all ranks hold: an equal, contiguous share."""
    total = sum(piece.data.numel() for piece in pieces)
    first, last = rank * total // world_size, (rank + 1) * total // world_size
    share, position = [], 0
    for piece in pieces:
        size = piece.data.numel()
        begin, end = max(first - position, 0), min(last - position, size)
        if begin < end:
            share.append(Piece(piece.name, piece.start + begin, piece.data[begin:end]))
        position += size
    return share


def write_shard(path: Path, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Write pieces (on the host) into one file and wait until it is on the disk; return {"bytes": ..., "sha256": ...}.

    Written here and not by safetensors, so that the digest is that of the memory and not of the disk, and a full disk
    is an OSError. Raises OSError with the file's name.
    """
    header, position = {}, 0
    for piece in pieces:
        size = piece.data.numel() * piece.data.element_size()
        header[f"{piece.name}@{piece.start}"] = {
            "dtype": DTYPES[piece.data.dtype],
            "shape": [piece.data.numel()],
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    views = [memoryview(len(text).to_bytes(8, "little") + text), *(_bytes(piece.data) for piece in pieces)]
    try:
        with open(path, "wb", buffering=0) as file:
            for view in views:
                while view:
                    count = file.write(view[:CHUNK_BYTES])
                    digest.update(view[:count])
                    view = view[count:]
                    written += count
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return {"bytes": written, "sha256": digest.hexdigest()}


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while content := file.read(CHUNK_BYTES):
            digest.update(content)
    return digest.hexdigest()


class ShardReader:
    """Reader of a checkpoint's shard files, stretch by stretch. A context manager."""

    def __init__(self, files: Iterable[Path]):
        """Open the files. Raises RunError naming a file that is not in the safetensors layout."""
        self._open, self._stretches = [], defaultdict(list)
        for path in files:
            try:
                file = safe_open(path, framework="pt")
                file.__enter__()
            except (OSError, SafetensorError) as error:
                self.__exit__()
                raise RunError(f"{path} cannot be read: {error}") from None
            self._open.append(file)
            for key in file.keys():  # noqa: SIM118  (a file, not a dict)
                name, _, start = key.rpartition("@")
                length = file.get_slice(key).get_shape()[0]
                self._stretches[name].append((int(start), int(start) + length, file, key))
        for stretches in self._stretches.values():
            stretches.sort(key=lambda stretch: stretch[0])

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._stretches)

    def fill(self, piece: Piece) -> None:
        """Copy a piece's elements into its data, on any device. Raises RunError when some are missing."""
        wanted, end = piece.start, piece.start + piece.data.numel()
        for first, last, file, key in self._stretches.get(piece.name, ()):
            if first <= wanted < last:
                until = min(last, end)
                part = file.get_slice(key)[wanted - first : until - first]
                piece.data[wanted - piece.start : until - piece.start].copy_(part)
                wanted = until
                if wanted == end:
                    return
        if wanted < end:
            raise RunError(f"elements {wanted} to {end} of {piece.name} are in none of its files")

    def whole(self, name: str) -> torch.Tensor:
        """Return a flattened tensor [n] of the state, on the host. Raises RunError when elements are missing."""
        stretches = self._stretches.get(name)
        if not stretches:
            raise RunError(f"{name} is in none of its files")
        _, _, file, key = stretches[0]
        dtype = file.get_slice(key)[:0].dtype
        data = torch.empty(stretches[-1][1], dtype=dtype)
        self.fill(Piece(name, 0, data))
        return data

    def model_state(self) -> dict[str, torch.Tensor]:
        """Return the weights, or their average where one was kept, and the buffers, each flattened [n], by name."""
        parts = [name.partition("/")[::2] for name in self.names]
        weights = EMA if any(part == EMA for part, _ in parts) else "weight"
        return {name: self.whole(f"{part}/{name}") for part, name in parts if part in (weights, "buffer")}

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.pop().__exit__(None, None, None)


def _bytes(data: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the host, without a copy."""
    return data.view(torch.uint8).numpy().data if data.numel() else memoryview(b"")
