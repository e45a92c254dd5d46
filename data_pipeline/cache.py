"""A cache of encoded images on the node's own disk, filled as they are read and shared by the node's ranks.

    DIR/<digest of the index>/2a/4138             image 4138: its bytes, then their CRC-32
    DIR/<digest of the index>/filling-PID-x1y2/   what one process is writing; locked while it runs

A file is renamed into place when it is complete. It is not synchronised to the disk: one that a power failure has
damaged does not match its checksum, and is read from the source and written again. Nothing is ever evicted: in a random
order every image is equally likely to be next, so the set of images that may be cached is fixed instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.arrays import BoolArray, Int64Array, Uint8Array
from data_pipeline.index import Index
from data_pipeline.rng import generator

FREE_SHARE = 0.1  # share of the disk that is never filled
BLOCK_BYTES = 4096
CHECKSUM_BYTES = 4
FOLDERS = 256

log = logging.getLogger("data_pipeline")


class ImageCache:
    """A cache of encoded images below `folder`; safe to use from several threads and processes.

    `limit_gib` bounds the size on disk of this index's images (default: no bound); FREE_SHARE of the disk stays free in
    any case. A full or failing disk is reported in one warning, and images are read from their source.
    """

    def __init__(self, folder: str | os.PathLike[str], index: Index, *, limit_gib: float | None = None):
        self.folder = Path(folder)
        self._index = index
        digest = hashlib.blake2b(index.digest().encode(), digest_size=16)
        digest.update(np.ascontiguousarray(index.mtime_ns).data)
        self._data = self.folder / digest.hexdigest()
        self._cacheable = _cacheable(index.num_bytes, limit_gib)
        self._reads = self._fills = True
        self._warned = False
        self._lock = threading.Lock()
        self._own: Path | None = None
        self._own_fd = -1
        self._numbers = itertools.count()

    def read(self, image: int, source: Callable[[int], Uint8Array]) -> tuple[Uint8Array, bool]:
        """Return the encoded bytes of `image`, uint8 [bytes], and whether they come from the cache.

        An image that is not cached is read by `source(image)`, whose exceptions pass through, and then cached.
        """
        if not self._cacheable[image]:
            return source(image), False
        found = self._find(image) if self._reads else None
        if found is not None:
            return found, True
        data = source(image)
        if self._fills:
            self._fill(image, data)
        return data, False

    def forget(self, image: int) -> None:
        """Remove an image that could not be decoded, so that its source is read next time."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(image))

    def close(self) -> None:
        """Remove this process's temporary folder; filling again makes another."""
        with self._lock:
            own, self._own = self._own, None
            if own is not None:
                shutil.rmtree(own, ignore_errors=True)
                os.close(self._own_fd)

    def _path(self, image: int) -> str:
        return f"{self._data}/{image % FOLDERS:02x}/{image}"

    def _find(self, image: int) -> Uint8Array | None:
        expected = int(self._index.num_bytes[image])
        try:
            fd = os.open(self._path(image), os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.read(fd, expected + CHECKSUM_BYTES + 1)
            finally:
                os.close(fd)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._reads = self._fills = False
            self._warn(f"cannot be read ({error.strerror}); the images are read from {self._index.root} instead")
            return None
        if _checksum(data[:expected]) != data[expected:]:
            return None
        return np.frombuffer(data, np.uint8, expected)

    def _fill(self, image: int, data: Uint8Array) -> None:
        try:
            temporary = self._own_folder() / str(next(self._numbers))
            if not self._has_room():
                return
            try:
                with open(temporary, "wb") as file:
                    file.write(data.data)
                    file.write(_checksum(data.data))
                os.replace(temporary, self._path(image))
            except OSError:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        except OSError as error:
            self._fills = False
            self._warn(
                f"cannot be written to ({error.strerror}); images that are not in it are read from {self._index.root}"
            )

    def _has_room(self) -> bool:
        disk = os.statvfs(self._data)
        if disk.f_bavail >= FREE_SHARE * disk.f_blocks:
            return True
        self._warn(
            f"is full: {FREE_SHARE:.0%} of its disk, {FREE_SHARE * disk.f_blocks * disk.f_frsize / 2**30:.1f} GiB, "
            f"stays free; images that are not in it are read from {self._index.root}"
        )
        return False

    def _own_folder(self) -> Path:
        """Return this process's temporary folder; the first call makes it and removes those of dead processes."""
        with self._lock:
            if self._own is None:
                self._data.mkdir(parents=True, exist_ok=True)
                fd = os.open(self._data, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(
                        fd, fcntl.LOCK_EX
                    )  # one process at a time, so that no process sees another's folder unlocked
                    for number in range(FOLDERS):
                        (self._data / f"{number:02x}").mkdir(exist_ok=True)
                    for left in self._data.glob("filling-*"):
                        _remove_unless_locked(left)
                    own = Path(tempfile.mkdtemp(prefix=f"filling-{os.getpid()}-", dir=self._data))
                    self._own_fd = os.open(own, os.O_RDONLY | os.O_CLOEXEC)
                    fcntl.flock(self._own_fd, fcntl.LOCK_EX)
                    self._own = own
                finally:
                    os.close(fd)
            return self._own

    def _warn(self, message: str) -> None:
        with self._lock:
            if not self._warned:
                self._warned = True
                log.warning("data.cache %s %s", self.folder, message)


def _cacheable(num_bytes: Int64Array, limit_gib: float | None) -> BoolArray:
    """Return which images may be cached, bool [n]: as many as fit, in a fixed pseudo-random order."""
    if limit_gib is None:
        return np.ones(len(num_bytes), bool)
    blocks = -(-(num_bytes + CHECKSUM_BYTES) // BLOCK_BYTES)
    order = np.argsort(generator(0, "cache", 0).bit_generator.random_raw(len(num_bytes)), kind="stable")
    fits = np.empty(len(num_bytes), bool)
    fits[order] = np.cumsum(blocks[order]) * BLOCK_BYTES <= limit_gib * 2**30
    return fits


def _checksum(data: bytes | memoryview) -> bytes:
    return zlib.crc32(data).to_bytes(CHECKSUM_BYTES, "little")


def _remove_unless_locked(folder: Path) -> None:
    with contextlib.suppress(OSError):  # its process runs, or has just removed it
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(fd)
