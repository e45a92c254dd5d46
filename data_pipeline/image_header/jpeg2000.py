"""Read the header of a JPEG 2000 file (.jp2): size, and whether its end is there.

Kinds that DALI decodes wrongly or not at all (seen with DALI 2.4) are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from data_pipeline.errors import BadImage
from data_pipeline.image_header.window import HEAD_BYTES, Header, Window

JP2_START = b"\0\0\0\x0cjP  \r\n\x87\n"
_CMYK = 12


def jp2_header(window: Window) -> Header:
    """Return the header of a JPEG 2000 file. Raises BadImage."""
    header, colours, at = None, None, 0
    for name, at, end in _boxes(window, 0, window.num_bytes):
        if name == b"jp2h":
            for inner, inside, _ in _boxes(window, at, end):
                if inner == b"ihdr":
                    header = struct.unpack(">IIHB", window.whole(inside, 11, "JPEG 2000"))
                elif inner == b"colr" and colours is None and window(inside, 1) == b"\x01":
                    colours = int.from_bytes(window.whole(inside + 3, 4, "JPEG 2000"), "big")
                elif inner == b"pclr":
                    raise BadImage("a JPEG 2000 image with a palette, which DALI does not decode; convert it")
        elif name == b"jp2c":
            break
    else:
        raise BadImage("damaged JPEG 2000 image (no image data)")
    if header is None:
        raise BadImage("damaged JPEG 2000 header (no size)")
    height, width, channels, depth = header
    if channels not in (1, 3, 4) or depth not in (7, 15) or colours == _CMYK:
        raise BadImage(
            f"a JPEG 2000 image of {channels} channels, {(depth & 0x7F) + 1} bits per sample, colour kind {colours}, "
            "which DALI does not decode as it is stored; convert it to 8-bit RGB"
        )
    tail = max(at, end - HEAD_BYTES)
    if b"\xff\xd9" not in window(tail, end - tail):
        raise BadImage("truncated JPEG 2000 image (no end marker)")
    return Header(height, width)


def _boxes(window: Window, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, where its content begins, where it ends) of the boxes from `at` to `end`."""
    while at + 8 <= end:
        size, name = struct.unpack(">I4s", window.whole(at, 8, "JPEG 2000"))
        content = at + 8
        if size == 1:
            size, content = struct.unpack(">Q", window.whole(at + 8, 8, "JPEG 2000"))[0], at + 16
        after = end if size == 0 else at + size
        if after > end or after < content:
            raise BadImage(f"truncated JPEG 2000 image ({window.num_bytes} of {after} bytes)")
        yield name, content, after
        at = after
