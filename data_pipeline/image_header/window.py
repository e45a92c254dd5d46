"""A window on an image's bytes, and the header that the reader of each format returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from data_pipeline.errors import BadImage

HEAD_BYTES = 4096  # enough for nearly every header; embedded thumbnails and colour profiles are skipped over

Read = Callable[[int, int], bytes]  # (offset, length) -> at most `length` bytes of an image


class Header(NamedTuple):
    """Height and width in pixels as stored, and the EXIF orientation, 1 to 8 (1: as stored)."""

    height: int
    width: int
    orientation: int = 1


class Window:
    """An image's bytes by offset, read a few kilobytes at a time and kept until others are needed."""

    def __init__(self, read: Read, num_bytes: int):
        self.num_bytes = num_bytes
        self._read, self._base, self._data = read, 0, read(0, HEAD_BYTES)

    def __call__(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer where the image ends."""
        if offset >= self.num_bytes:
            return b""
        start = offset - self._base
        if start < 0 or start + length > len(self._data):
            self._base, self._data, start = offset, self._read(offset, max(length, HEAD_BYTES)), 0
        return self._data[start : start + length]

    def whole(self, offset: int, length: int, what: str) -> bytes:
        """Return `length` bytes from `offset`. Raises BadImage when the image of kind `what` ends before."""
        found = self(offset, length)
        if len(found) < length:
            raise BadImage(f"truncated {what} (its header is incomplete)")
        return found


def reader_of(fd: int, base: int, size: int) -> Read:
    """Return a function that reads (offset, length) of the `size` bytes at `base` of an open file."""
    return lambda offset, length: os.pread(fd, max(0, min(length, size - offset)), base + offset)
