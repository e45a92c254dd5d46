"""The images of an index as columns, and the files that could not be read: the result of a scan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.arrays import Int64Array, Uint8Array

COLUMNS = {
    "label": np.int32,
    "height": np.int32,
    "width": np.int32,
    "num_bytes": np.int64,
    "mtime_ns": np.int64,
    "offset": np.int64,
    "shard": np.int32,
    "orientation": np.uint8,
}


@dataclass
class Bad:
    """An unreadable file: its relative name, the reason, and its size and modification time when it was read."""

    name: str
    reason: str
    num_bytes: int
    mtime_ns: int


@dataclass
class Rows:
    """Images as columns: `names` are joined bytes, name i ends at `ends[i]`; the other columns are COLUMNS."""

    names: Uint8Array
    ends: Int64Array
    columns: dict[str, np.ndarray]
    bad: list[Bad] = field(default_factory=list)
    read: int = 0  # number of images that were read, not copied
    same: int = 0  # number of images with the name and size of an earlier row
    files: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))  # equal where two names are one file

    @classmethod
    def of(cls, names: list[bytes], values: Sequence[Sequence[int]], bad: list[Bad], read: int, same: int = 0) -> Rows:
        """Return the rows of images by name; `values` has one number per column."""
        table = np.array(values, np.int64).reshape(len(values), len(COLUMNS))
        columns = {name: table[:, k].astype(dtype) for k, (name, dtype) in enumerate(COLUMNS.items())}
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return cls(np.frombuffer(b"".join(names), np.uint8), ends, columns, bad, read=read, same=same)

    @classmethod
    def joined(cls, parts: list[Rows]) -> Rows:
        """Return the rows and bad files of all parts, in order."""
        base = np.cumsum([0] + [len(part.names) for part in parts])
        return cls(
            np.concatenate([np.zeros(0, np.uint8)] + [part.names for part in parts]),
            np.concatenate([np.zeros(0, np.int64)] + [part.ends + base[k] for k, part in enumerate(parts)]),
            {
                name: np.concatenate([np.zeros(0, dtype)] + [part.columns[name] for part in parts])
                for name, dtype in COLUMNS.items()
            },
            bad=[bad for part in parts for bad in part.bad],
            read=sum(part.read for part in parts),
            same=sum(part.same for part in parts),
            files=np.concatenate([np.zeros(0, np.int64)] + [part.files for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def slice(self, first: int, last: int) -> Rows:
        """Return rows first..last-1, without the bad files."""
        begin = int(self.ends[first - 1]) if first else 0
        end = int(self.ends[last - 1]) if last else 0
        columns = {name: column[first:last] for name, column in self.columns.items()}
        return Rows(self.names[begin : max(begin, end)], self.ends[first:last] - begin, columns)

    def take(self, rows: Int64Array) -> Rows:
        """Return the rows with these numbers, without the bad files."""
        names = [self.name(int(row)) for row in rows]
        columns = {name: column[rows] for name, column in self.columns.items()}
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return Rows(np.frombuffer(b"".join(names), np.uint8), ends, columns)

    def name(self, row: int) -> bytes:
        """Return the relative path, or the name within its shard."""
        return self.names[int(self.ends[row - 1]) if row else 0 : int(self.ends[row])].tobytes()

    def shard_name(self, shards: list[str], row: int) -> str:
        """Return the name to show: relative path, or shard/member."""
        shard = int(self.columns["shard"][row])
        name = os.fsdecode(self.name(row))
        return name if shard < 0 else f"{shards[shard]}/{name}"
