"""Read the bytes of one image by its place in the index: a file, or a part of a tar shard."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

import numpy as np

from data_pipeline.arrays import Uint8Array
from data_pipeline.errors import BadImage
from data_pipeline.image_header.read import check_whole
from data_pipeline.index import Index

OPEN_SHARDS = 128


class ByteReader:
    """A reader of encoded images by random access; safe to use from several threads."""

    def __init__(self, index: Index):
        self._index = index
        self._shards: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, image: int) -> Uint8Array:
        """Return the encoded bytes of image `image`, uint8 [bytes].

        Raises BadImage when they are missing, their number is not the index's, or their start or end is not that of an
        image.
        """
        index = self._index
        shard, expected = int(index.shard[image]), int(index.num_bytes[image])
        try:
            if shard < 0:
                with _Descriptor(index.path(image)) as file:
                    found = os.fstat(file.fd).st_size
                    if found != expected:
                        raise BadImage(f"changed since it was indexed ({found} bytes, expected {expected})")
                    data = os.pread(file.fd, expected, 0)
            else:
                opened = self._shard(shard)  # held here, so that it stays open while it is read
                data = os.pread(opened.fd, expected, int(index.offset[image]))
        except FileNotFoundError:
            raise BadImage("missing") from None
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror})") from None
        if len(data) != expected:
            raise BadImage(f"shrunk since it was indexed ({len(data)} bytes, expected {expected})")
        check_whole(data)
        return np.frombuffer(data, np.uint8)

    def _shard(self, shard: int) -> _Descriptor:
        with self._lock:
            if shard in self._shards:
                self._shards.move_to_end(shard)
                return self._shards[shard]
        opened = _Descriptor(
            self._index.root / self._index.shard_names[shard]
        )  # outside the lock: other threads need not wait
        with self._lock:
            self._shards[shard] = opened
            self._shards.move_to_end(shard)
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)  # closed when its last reader drops it
            return opened


class _Descriptor:
    """A file descriptor that closes itself when the last user has dropped it."""

    def __init__(self, path: os.PathLike[str]):
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> _Descriptor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file descriptor; closing it again does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
