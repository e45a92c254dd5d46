"""Reading image headers in several processes: the work behind an index.

An image folder is cut into chunks of names, tar shards are one task each. A task is a plain tuple and gives
`Rows`, so that any process can do it; unchanged files are copied from the rows of an earlier index.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import tarfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.headers import IMAGE_SUFFIXES, BadImage, Header, read_header

ONE_PROCESS_IMAGES, ONE_PROCESS_SHARDS = 5000, 1  # starting processes takes longer than this many
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
# Members beside an image in WebDataset shards that are no images and need not be mentioned.
COMPANIONS = frozenset(
    (".cls", ".json", ".jsonl", ".txt", ".caption", ".tags", ".csv", ".xml", ".yaml", ".html", ".url", ".id", ".key")
).union((".index", ".meta", ".bbox", ".npy", ".npz", ".pth", ".pt", ".pkl", ".pickle", ".pyd", ".md5", ".sha256"))

_LABEL = re.compile(rb"\s*(\d{1,9})\s*\Z")


@dataclass
class Bad:
    """An unreadable file: its relative name, the reason, and the size and time at which it was so."""

    name: str
    reason: str
    num_bytes: int
    mtime_ns: int


@dataclass
class Rows:
    """Images as columns: `names` are joined bytes, name i ends at `ends[i]`; other columns are COLUMNS."""

    names: np.ndarray
    ends: np.ndarray
    columns: dict[str, np.ndarray]
    bad: list[Bad] = field(default_factory=list)
    read: int = 0  # how many were read anew
    same: int = 0  # how many have the name and size of an earlier row
    files: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # equal where two names are one file

    @classmethod
    def of(cls, names: list[bytes], values: list[tuple[int, ...]], bad: list[Bad], read: int, same: int = 0) -> Rows:
        table = np.array(values, np.int64).reshape(len(values), len(COLUMNS))
        columns = {name: table[:, k].astype(dtype) for k, (name, dtype) in enumerate(COLUMNS.items())}
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return cls(np.frombuffer(b"".join(names), np.uint8), ends, columns, bad, read, same)

    @classmethod
    def joined(cls, parts: list[Rows]) -> Rows:
        base = np.cumsum([0] + [len(part.names) for part in parts])
        return cls(
            np.concatenate([np.zeros(0, np.uint8)] + [part.names for part in parts]),
            np.concatenate([np.zeros(0, np.int64)] + [part.ends + base[k] for k, part in enumerate(parts)]),
            {
                name: np.concatenate([np.zeros(0, dtype)] + [part.columns[name] for part in parts])
                for name, dtype in COLUMNS.items()
            },
            [bad for part in parts for bad in part.bad],
            sum(part.read for part in parts),
            sum(part.same for part in parts),
            np.concatenate([np.zeros(0, np.int64)] + [part.files for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def slice(self, first: int, last: int) -> Rows:
        """Rows first..last-1, without the bad files."""
        begin = int(self.ends[first - 1]) if first else 0
        end = int(self.ends[last - 1]) if last else 0
        columns = {name: column[first:last] for name, column in self.columns.items()}
        return Rows(self.names[begin : max(begin, end)], self.ends[first:last] - begin, columns)

    def take(self, rows: np.ndarray) -> Rows:
        """The rows of these numbers, without the bad files."""
        names = [self.name(int(row)) for row in rows]
        columns = {name: column[rows] for name, column in self.columns.items()}
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return Rows(np.frombuffer(b"".join(names), np.uint8), ends, columns)

    def name(self, row: int) -> bytes:
        return self.names[int(self.ends[row - 1]) if row else 0 : int(self.ends[row])].tobytes()

    def shard_name(self, shards: list[str], row: int) -> str:
        """Name for people: relative path, or shard/member."""
        shard = int(self.columns["shard"][row])
        name = os.fsdecode(self.name(row))
        return name if shard < 0 else f"{shards[shard]}/{name}"


def scan_names(task: tuple[str, int, bytes, Rows | None, list[Bad]]) -> Rows:
    """Rows of a chunk of files: (root, label, names, earlier rows of these names, earlier bad files)."""
    root, label, joined, known, known_bad = task
    earlier = {known.name(row): row for row in range(len(known))} if known is not None else {}
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
    """Return a number that is equal for two names of one file; the names' own where the file system has no inodes."""
    return hash((status.st_dev, status.st_ino)) if status.st_ino else hash(name)


def _same(known: Rows, row: int, status: os.stat_result) -> bool:
    """Return whether a file's row still holds; one without orientation, of an older index, is read anew."""
    found = (known.columns[name][row] for name in ("num_bytes", "mtime_ns"))
    return tuple(found) == (status.st_size, status.st_mtime_ns) and known.columns["orientation"][row] > 0


def scan_shard(task: tuple[str, int, str]) -> tuple[Rows, dict[str, int]]:
    """Rows of one shard, and its other members by suffix: (root, shard number, relative path).

    Labels come from each key's `.cls` member.
    """
    root, shard, relative = task
    path = os.path.join(root, relative)
    names, values, bad = [], [], []
    labels: dict[str, int] = {}
    keys: list[str] = []
    others: Counter[str] = Counter()
    try:
        status = os.stat(path)
        with tarfile.open(path, "r:") as archive, open(path, "rb", buffering=0) as file:
            for member in _members(archive, relative, bad, status):
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


def _members(archive: tarfile.TarFile, relative: str, bad: list[Bad], status: os.stat_result):
    """Members, as far as the archive can be read; damage is noted once."""
    damage = None
    try:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile remembers every member; a shard has tens of thousands
            yield member
        if os.pread(archive.fileobj.fileno(), tarfile.BLOCKSIZE, archive.offset).strip(b"\0"):
            damage = f"no tar header at byte {archive.offset}"  # where tarfile ends without a word
    except tarfile.TarError as error:
        damage = str(error)
    if damage:
        bad.append(Bad(relative, f"damaged shard ({damage})", status.st_size, status.st_mtime_ns))


def _bad(shard: str, member: str, reason: str, status: os.stat_result) -> Bad:
    return Bad(f"{shard}/{member}", reason, status.st_size, status.st_mtime_ns)


def reader_of(fd: int, base: int, size: int) -> Callable[[int, int], bytes]:
    """Return what reads (offset, length) of the `size` bytes at `base` of an open file."""
    return lambda offset, length: os.pread(fd, max(0, min(length, size - offset)), base + offset)


def reason_of(error: Exception) -> str:
    """One line for people."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


Progress = bool | Callable[[int, int], None]


def run_tasks(
    title: str, function: Callable, tasks: list, counts: list[int], workers: int | None, progress: Progress
) -> list:
    """Results of `function` over `tasks`, in order, from `workers` processes (default: one a core, at most 16).

    `counts` are the images or shards of each task; `progress` shows a bar on a terminal, or is called with
    (done, total).
    """
    done, total, results = 0, sum(counts), []

    def collect(advance: Callable[[int, int], None]) -> None:
        nonlocal done
        for result, count in zip(_in_processes(function, tasks, workers), counts, strict=True):
            results.append(result)
            done += count
            advance(done, total)

    if callable(progress):
        collect(progress)
    elif progress and total > 1 and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total)
            collect(lambda done, _: bar.update(task, completed=done))
    else:
        collect(lambda done, total: None)
    return results


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(function: Callable, tasks: list, workers: int | None) -> Iterator:
    if workers is None:
        workers = min(16, available_cores())
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent) as pool:
        try:
            # Ctrl-C in a terminal would reach the workers too; they start with it blocked, and this process ends them.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                results = deque(pool.submit(function, task) for task in tasks)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            while results:
                yield results.popleft().result()
        except KeyboardInterrupt:  # cancels nothing: the pool's own thread fails on cancelled tasks of killed workers
            for worker in multiprocessing.active_children():
                worker.kill()
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, killed for example: it would wait for work for ever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
