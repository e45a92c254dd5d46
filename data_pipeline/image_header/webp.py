"""Read the header of a WebP: size, orientation, and whether all bytes are there.

Of an animation the first frame is used.
"""

from __future__ import annotations

import struct

from data_pipeline.errors import BadImage
from data_pipeline.image_header.tiff import exif_orientation
from data_pipeline.image_header.window import Header, Window

_VP8_START, _VP8L_START = b"\x9d\x01\x2a", 0x2F
_WEBP_EXIF = 0x08


def webp_header(window: Window) -> Header:
    """Return the header of a WebP. Raises BadImage."""
    start = window.whole(0, 30, "WebP")
    end = 8 + struct.unpack_from("<I", start, 4)[0]
    if end > window.num_bytes:
        raise BadImage(f"truncated WebP ({window.num_bytes} of {end} bytes)")
    kind = start[12:16]
    if kind == b"VP8 " and start[23:26] == _VP8_START:
        width, height = struct.unpack_from("<HH", start, 26)
        return Header(height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L" and start[20] == _VP8L_START:
        bits = struct.unpack_from("<I", start, 21)[0]
        return Header((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise BadImage("damaged WebP header")
    width, height = (int.from_bytes(start[at : at + 3], "little") + 1 for at in (24, 27))
    return Header(height, width, _webp_orientation(window, end) if start[20] & _WEBP_EXIF else 1)


def _webp_orientation(window: Window, end: int) -> int:
    at = 12
    while at + 8 <= end:
        name, size = window(at, 4), int.from_bytes(window(at + 4, 4), "little")
        if name == b"EXIF":
            return exif_orientation(window, at + 8)
        at += 8 + size + size % 2
    return 1
