"""Read the header of a BMP: size, and whether all bytes are there.

Kinds that DALI decodes wrongly or not at all (seen with DALI 2.4) are refused.
"""

from __future__ import annotations

import struct

from data_pipeline.errors import BadImage
from data_pipeline.image_header.window import Header, Window

_RGB_MASKS = (0xFF0000, 0xFF00, 0xFF)


def bmp_header(window: Window) -> Header:
    """Return the header of a BMP. Raises BadImage."""
    start = window.whole(0, 26, "BMP")
    body, size = struct.unpack_from("<II", start, 10)
    compression = data = 0
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", start, 18)
    else:
        start = window.whole(0, 54, "BMP")
        width, height, _, bits, compression, data = struct.unpack_from("<iiHHII", start, 18)
    height = abs(height)  # negative: rows are stored from the top down
    end = body + (data if compression in (1, 2) else (width * bits + 31) // 32 * 4 * height)  # 1, 2: run-length encoded
    if width < 0 or bits not in (1, 4, 8, 24, 32) or compression not in (0, 1, 2, 3):
        raise BadImage(f"a BMP of {bits} bits per pixel, compression {compression}; convert it to 24 bits")
    if compression == 3 and struct.unpack("<III", window.whole(54, 12, "BMP")) != _RGB_MASKS:
        raise BadImage("a BMP with its colours in an unusual order; convert it to 24 bits")
    if end > window.num_bytes:
        raise BadImage(f"truncated BMP ({window.num_bytes} of {end} bytes)")
    return Header(height, width)
