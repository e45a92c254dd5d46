"""The index of a data folder: a table of its images, and the file it is kept in.

Columns of NumPy arrays, about 100 bytes per image, so that 15 million images fit; kept in one file (NumPy's
npz) beside the data or elsewhere. Images are in the order of their relative paths as bytes, so that the same
folder gives the same index on every machine and with any number of processes. Heights and widths are those of
the stored pixels, as the paper's code takes them; `turned` gives those of the pixels turned by EXIF.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.arrays import Int64Array
from data_pipeline.errors import UsageError
from data_pipeline.files import whole_file
from data_pipeline.index_rows import COLUMNS, Bad, Rows
from data_pipeline.rng import generator

INDEX_NAME = ".mae_scale_index.npz"
FORMAT = 1
KINDS_SHOWN = 8
_NOT_IN_DIGEST = ("mtime_ns", "orientation")


class DamagedIndex(UsageError):
    """An index file that is damaged or of another format."""


@dataclass(frozen=True)
class Remarks:
    """Remarks on a data folder for its user.

    `left_out` counts the files that are not images of a supported type, by shard ("" for a folder) and suffix; `lines`
    are sentences.
    """

    left_out: dict[str, dict[str, int]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """Return all remarks, one line per subject."""
        counts: dict[str, int] = {}
        for found in self.left_out.values():
            for suffix, count in found.items():
                counts[suffix] = counts.get(suffix, 0) + count
        if not counts:
            return self.lines
        kinds = sorted(counts, key=lambda suffix: (-counts[suffix], suffix))
        shown = [f"{counts[suffix]:,} {suffix}" for suffix in kinds[:KINDS_SHOWN]]
        if rest := sum(counts[suffix] for suffix in kinds[KINDS_SHOWN:]):
            shown.append(f"{rest:,} others")
        return [f"left out: {', '.join(shown)}", *self.lines]


class Index:
    """The readable images of a data folder, as columns; image i is row i.

    `label` int32 [n] (-1: none), `height` and `width` int32 [n] (pixels as stored), `num_bytes`, `mtime_ns`
    and `offset` int64 [n] (offset into the shard, 0 for a file), `shard` int32 [n] (-1 for a file), `orientation`
    uint8 [n] (EXIF's, 1 to 8; 0: not known, of an older index); `classes` the class names by label; `shard_names` and
    `shard_bytes`; `bad` the unreadable files, which have no row; `remarks` on other files of the folder.
    """

    def __init__(
        self,
        root: Path,
        rows: Rows,
        classes: list[str],
        shard_names: list[str] | None = None,
        *,
        shard_bytes: list[int] | None = None,
        remarks: Remarks | None = None,
    ) -> None:
        self.root = Path(root)
        self.rows = rows
        self.classes = classes
        self.shard_names = shard_names or []
        self.shard_bytes = shard_bytes or []
        self.label, self.height, self.width = (rows.columns[name] for name in ("label", "height", "width"))
        self.num_bytes, self.mtime_ns = rows.columns["num_bytes"], rows.columns["mtime_ns"]
        self.offset, self.shard = rows.columns["offset"], rows.columns["shard"]
        self.orientation = rows.columns["orientation"]
        self.remarks = remarks or Remarks()

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Index({str(self.root)!r}, {self.summary()})"

    @property
    def kind(self) -> str:
        """Return "folder" or "shards"."""
        return "shards" if self.shard_names else "folder"

    @property
    def bad(self) -> list[Bad]:
        """Return the files that were left out as unreadable."""
        return self.rows.bad

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """Return (name, reason) of the files that were left out as unreadable."""
        return [(bad.name, bad.reason) for bad in self.bad]

    def name(self, image: int) -> str:
        """Return the path relative to the folder, or shard/member."""
        return self.rows.shard_name(self.shard_names, int(image))

    def path(self, image: int) -> Path:
        """Return the file that holds image `image`: its own, or its shard."""
        shard = int(self.shard[image])
        inside = os.fsdecode(self.rows.name(int(image))) if shard < 0 else self.shard_names[shard]
        return self.root / inside

    def take(self, images: Int64Array) -> Index:
        """Return an index of these images, int [n], in this order."""
        return self._of(self.rows.take(images))

    def turned(self) -> Index:
        """Return an index with the heights and widths of the images turned by their EXIF orientation.

        Raises UsageError when an orientation is unknown.
        """
        if not self.orientation.all():
            raise UsageError(
                f"the index of {self.root} is of an older version, without EXIF orientations; build it again with "
                "`mae-scale data index`, or remove data.exif_orientation"
            )
        lying = self.orientation >= 5
        columns = dict(self.rows.columns)
        columns["height"] = np.where(lying, self.width, self.height)
        columns["width"] = np.where(lying, self.height, self.width)
        return self._of(Rows(self.rows.names, self.rows.ends, columns, self.rows.bad))

    def at(self, root: Path) -> Index:
        """Return this index for data that now lie at `root`."""
        return self._of(self.rows, root)

    def _of(self, rows: Rows, root: Path | None = None) -> Index:
        return Index(
            root or self.root,
            rows,
            self.classes,
            self.shard_names,
            shard_bytes=self.shard_bytes,
            remarks=self.remarks,
        )

    def few(self, count: int, *, seed: int) -> Index:
        """Return an index of `count` images per class, drawn with the seed, in the order of this one.

        Raises UsageError when a class has fewer.
        """
        chosen = []
        for label in np.unique(self.label):
            images = np.flatnonzero(self.label == label)
            if len(images) < count:
                name = self.classes[label] if self.classes else str(label)
                raise UsageError(
                    f"data.labels_per_class={count}: class {name} has {len(images)} images; choose at most that many"
                )
            draws = generator(seed, "few", int(label)).bit_generator.random_raw(len(images))
            chosen.append(images[np.argsort(draws, kind="stable")[:count]])
        return self.take(np.sort(np.concatenate(chosen)))

    def share(self, fraction: float, *, seed: int) -> Index:
        """Return an index of a share of the images, rounded to a whole number, in the order of this one.

        Drawn with the seed from all images alike, whatever their class. Nested: of two shares the images of the smaller
        one are among those of the larger.
        """
        draws = generator(seed, "share", 0).bit_generator.random_raw(len(self))
        chosen = np.argsort(draws, kind="stable")[: round(fraction * len(self))]
        return self.take(np.sort(chosen))

    def summary(self) -> str:
        """Return a summary on one line."""
        mib = self.num_bytes.sum() / 2**20
        parts = [f"{len(self):,} images", f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.2f} MiB"]
        if self.classes:
            nested = next((f" such as {name}" for name in self.classes if "/" in name), "")
            parts.append(f"{len(self.classes)} classes{nested}")
        if self.shard_names:
            parts.append(f"{len(self.shard_names)} shards")
        if self.bad:
            parts.append(f"{len(self.bad):,} unreadable files left out")
        return ", ".join(parts)

    def digest(self) -> str:
        """Return 32 hex digits that change with any image, its order, size or label; not with times or the root."""
        state = hashlib.blake2b(digest_size=16)
        state.update(json.dumps([self.classes, self.shard_names]).encode())
        for column in (self.rows.names, self.rows.ends):
            state.update(np.ascontiguousarray(column).data)
        for name in COLUMNS:
            if name not in _NOT_IN_DIGEST:
                state.update(np.ascontiguousarray(self.rows.columns[name]).data)
        return state.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to `path`: whole, or not at all. Raises OSError."""
        path = Path(path)
        about = {
            "format": FORMAT,
            "root": str(self.root),
            "classes": self.classes,
            "shard_names": self.shard_names,
            "shard_bytes": self.shard_bytes,
            "bad": [[bad.name, bad.reason, bad.num_bytes, bad.mtime_ns] for bad in self.bad],
            "remarks": asdict(self.remarks),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            text = np.frombuffer(json.dumps(about).encode(), np.uint8)
            columns: dict[str, Any] = {"names": self.rows.names, "ends": self.rows.ends, **self.rows.columns}
            np.savez(file, about=text, **columns)


def load_index(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Index:
    """Read an index file; `root` is where the data lie now (default: where they lay when it was written).

    Raises UsageError when there is no such file or it cannot be read, DamagedIndex when it is damaged.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            if about["format"] != FORMAT:
                raise DamagedIndex(
                    f"index {path} is of format {about['format']}, expected {FORMAT}; delete it to build it again"
                )
            count = len(file["ends"])
            older = {"orientation": np.zeros(count)}  # missing in files of older versions
            columns = {
                name: (file[name] if name in file else older[name]).astype(dtype, copy=False)
                for name, dtype in COLUMNS.items()
            }
            rows = Rows(file["names"], file["ends"], columns, [Bad(*bad) for bad in about["bad"]])
            remarks = Remarks(**about.get("remarks", {}))
            root = Path(root or about["root"])
            index = Index(
                root,
                rows,
                about["classes"],
                about["shard_names"],
                shard_bytes=about["shard_bytes"],
                remarks=remarks,
            )
        if any(len(column) != count for column in columns.values()):
            raise ValueError("columns of different lengths")
    except FileNotFoundError:
        raise UsageError(f"no index at {path}; write it with `mae-scale data index`") from None
    except OSError as error:
        raise UsageError(f"index {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        raise DamagedIndex(f"{path} is damaged or not an index; delete it to build it again") from None
    return index
