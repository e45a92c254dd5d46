"""Catch the decoders' messages on C's stderr about damaged images that they decode all the same, to name the file.

libjpeg, libtiff and libpng know of no file names and print "Corrupt JPEG data: ..." from whatever thread decodes. While
`caught` lasts, C's variable `stderr` is a file in memory, as the C library allows; Python's own stderr, file descriptor
2 and C++'s cerr stay unchanged. Other text that was written there meanwhile is passed on afterwards.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Lines on missing or wrong pixels; other warnings, such as on an unusual header, do not concern the pixels.
_DAMAGE = re.compile(
    r"Corrupt JPEG data|Premature end of JPEG file|Unsupported marker type|Bogus |Invalid JPEG file structure"
    r"|(Huffman|Quantization|Arithmetic) table 0x|libpng error|Decode\w*: (?!.*Warning)|Using code not yet in table"
    r"|(Fill|Read)\w*: Read error"
)
# Lines of the decoders that do not concern the pixels.
_HARMLESS = re.compile(
    r"libpng warning|TIFF\w*: Warning|Invalid SOS parameters|Inconsistent progression|Unknown Adobe color transform"
    r"|unknown JFIF revision|JPEGLib: Warning"
)
_UNBUFFERED = 2  # _IONBF

_lock = threading.Lock()  # one batch is decoded at a time, so that the lines are its own


class _Catcher:
    """C's stderr and the file in memory that takes its place."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        self.variable = ctypes.c_void_p.in_dll(libc, "stderr")
        libc.fdopen.restype = ctypes.c_void_p
        self.fd = os.memfd_create("decoders' stderr", os.MFD_CLOEXEC)
        self.file = libc.fdopen(self.fd, b"a")
        libc.setvbuf(ctypes.c_void_p(self.file), None, _UNBUFFERED, ctypes.c_size_t(0))

    def take(self) -> list[str]:
        """Return the lines written since the last call."""
        size = os.fstat(self.fd).st_size
        if not size:
            return []
        text = os.pread(self.fd, size, 0).decode(errors="replace")
        os.ftruncate(self.fd, 0)
        return [line.strip() for line in text.splitlines() if line.strip()]


_catcher: _Catcher | None = None


@contextmanager
def caught() -> Iterator[list[str]]:
    """Yield a list that holds the decoders' lines on damage when the block has ended.

    Where C's stderr cannot be replaced, without glibc, it stays empty.
    """
    global _catcher
    damage: list[str] = []
    with _lock:
        try:
            _catcher = _catcher or _Catcher()
        except (AttributeError, OSError, ValueError):
            yield damage
            return
        before, _catcher.variable.value = _catcher.variable.value, _catcher.file
        try:
            yield damage
        finally:
            _catcher.variable.value = before
            lines = _catcher.take()
            damage += [line.lstrip(": ") for line in lines if _DAMAGE.search(line)]
            others = [line for line in lines if not _DAMAGE.search(line) and not _HARMLESS.search(line)]
            if others:
                os.write(2, ("\n".join(others) + "\n").encode())
