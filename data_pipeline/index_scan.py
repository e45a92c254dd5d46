"""Read the image headers of a chunk of files, or of one tar shard, into rows: the work behind an index.

A task is a plain tuple, so that any process can do it; unchanged files are copied from the rows of an earlier index.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator

import numpy as np

from data_pipeline.errors import BadImage, reason_of
from data_pipeline.image_header.read import IMAGE_SUFFIXES, read_header
from data_pipeline.image_header.window import Header, reader_of
from data_pipeline.index_rows import Bad, Rows

ONE_PROCESS_IMAGES, ONE_PROCESS_SHARDS = 5000, 1  # up to this many, starting processes would take longer
# Members beside an image in WebDataset shards that are not images and not reported.
COMPANIONS = frozenset(
    (".cls", ".json", ".jsonl", ".txt", ".caption", ".tags", ".csv", ".xml", ".yaml", ".html", ".url", ".id", ".key")
).union((".index", ".meta", ".bbox", ".npy", ".npz", ".pth", ".pt", ".pkl", ".pickle", ".pyd", ".md5", ".sha256"))

_LABEL = re.compile(rb"\s*(\d{1,9})\s*\Z")


def scan_names(task: tuple[str, int, bytes, Rows | None, list[Bad]]) -> Rows:
    """Return the rows of a chunk of files: (root, label, names, earlier rows of these names, earlier bad files)."""
    root, label, joined, known, known_bad = task
    known = Rows.of([], [], [], 0) if known is None else known
    earlier = {known.name(row): row for row in range(len(known))}
    bad_before = {bad.name: bad for bad in known_bad}
    names, values, files, bad, read, same = [], [], [], [], 0, 0
    for name in joined.split(b"\0"):
        path = os.path.join(os.fsencode(root), name)
        status = None
        try:
            status = os.stat(path)
            row = earlier.get(name)
            same += int(row is not None and known.columns["num_bytes"][row] == status.st_size)
            before = bad_before.get(os.fsdecode(name))
            if row is not None and _same(known, row, status):
                header = Header(*(int(known.columns[column][row]) for column in Header._fields))
            elif before and (before.num_bytes, before.mtime_ns) == (status.st_size, status.st_mtime_ns):
                bad.append(before)
                continue
            else:
                read += 1
                with open(path, "rb", buffering=0) as file:
                    header = read_header(reader_of(file.fileno(), 0, status.st_size), status.st_size)
        except (BadImage, OSError) as error:
            size, mtime_ns = (status.st_size, status.st_mtime_ns) if status else (-1, -1)
            bad.append(Bad(os.fsdecode(name), reason_of(error), size, mtime_ns))
            continue
        names.append(name)
        size, time_ns = status.st_size, status.st_mtime_ns
        values.append((label, header.height, header.width, size, time_ns, 0, -1, header.orientation))
        files.append(same_file(status, name))
    rows = Rows.of(names, values, bad, read, same)
    rows.files = np.array(files, np.int64)
    return rows


def same_file(status: os.stat_result, name: str | bytes) -> int:
    """Return a number that is equal for two names of one file; a hash of the name where there are no inodes."""
    return hash((status.st_dev, status.st_ino)) if status.st_ino else hash(name)


def _same(known: Rows, row: int, status: os.stat_result) -> bool:
    """Return whether a file's row is still right; one without orientation, of an older index, is not."""
    found = (known.columns[name][row] for name in ("num_bytes", "mtime_ns"))
    return tuple(found) == (status.st_size, status.st_mtime_ns) and known.columns["orientation"][row] > 0


def scan_shard(task: tuple[str, int, str]) -> tuple[Rows, dict[str, int]]:
    """Return the rows of one shard, and its other members by suffix: (root, shard number, relative path).

    Labels come from each key's `.cls` member.
    """
    root, shard, relative = task
    path = os.path.join(root, relative)
    names: list[bytes] = []
    values: list[list[int]] = []
    bad: list[Bad] = []
    labels: dict[str, int] = {}
    keys: list[str] = []
    others: Counter[str] = Counter()
    try:
        status = os.stat(path)
        with tarfile.open(path, "r:") as archive, open(path, "rb", buffering=0) as file:
            for member in _members(archive, file.fileno(), relative, bad, status):
                if not member.isreg():
                    others["links"] += int(member.issym() or member.islnk())
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = f"{folder}/{stem}", "." + suffix.lower()
                read = reader_of(file.fileno(), member.offset_data, member.size)
                if suffix == ".cls":
                    found = _LABEL.match(read(0, 32))
                    if found:
                        labels[key] = int(found[1])
                    else:
                        bad.append(_bad(relative, member.name, "its .cls is not a whole number", status))
                elif suffix in IMAGE_SUFFIXES:
                    try:
                        if member.offset_data + member.size > status.st_size:
                            raise BadImage("the shard ends before the image does")
                        height, width, orientation = read_header(read, member.size)
                    except BadImage as error:
                        bad.append(_bad(relative, member.name, str(error), status))
                        continue
                    names.append(os.fsencode(member.name))
                    keys.append(key)
                    size, at = member.size, member.offset_data
                    values.append([-1, height, width, size, status.st_mtime_ns, at, shard, orientation])
                elif suffix not in COMPANIONS:
                    others[suffix] += 1
    except (OSError, tarfile.TarError) as error:
        bad.append(Bad(relative, f"damaged shard ({reason_of(error)})", -1, -1))
    for value, key in zip(values, keys, strict=True):
        value[0] = labels.get(key, -1)
    return Rows.of(names, values, bad, len(names)), {suffix: count for suffix, count in others.items() if count}


def _members(
    archive: tarfile.TarFile, fd: int, relative: str, bad: list[Bad], status: os.stat_result
) -> Iterator[tarfile.TarInfo]:
    """Yield the members as far as the archive can be read, and add its damage to `bad` once."""
    damage = None
    try:
        while (member := archive.next()) is not None:
            vars(archive)["members"].clear()  # tarfile keeps every member; a shard has tens of thousands
            yield member
        if os.pread(fd, tarfile.BLOCKSIZE, archive.offset).strip(b"\0"):
            damage = f"no tar header at byte {archive.offset}"  # where tarfile stops without an error
    except tarfile.TarError as error:
        damage = str(error)
    if damage:
        bad.append(Bad(relative, f"damaged shard ({damage})", status.st_size, status.st_mtime_ns))


def _bad(shard: str, member: str, reason: str, status: os.stat_result) -> Bad:
    return Bad(f"{shard}/{member}", reason, status.st_size, status.st_mtime_ns)
