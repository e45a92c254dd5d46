"""Read the header of a binary PBM, PGM or PPM: size, and whether all bytes are there.

A largest value that DALI would take for another (seen with DALI 2.4) is refused.
"""

from __future__ import annotations

import re

from data_pipeline.errors import BadImage
from data_pipeline.image_header.window import HEAD_BYTES, Header, Window

_PNM = re.compile(rb"P([456])((?:\s+|#[^\n]*\n)+)(\d+)((?:\s+|#[^\n]*\n)+)(\d+)")
_PNM_LARGEST = re.compile(rb"(?:\s+|#[^\n]*\n)+(\d+)")


def pnm_header(window: Window) -> Header:
    """Return the header of a binary PBM, PGM or PPM. Raises BadImage."""
    start = window(0, HEAD_BYTES)
    found = _PNM.match(start)
    if found is None:
        raise BadImage("damaged PNM header")
    kind, width, height = int(found[1]), int(found[3]), int(found[5])
    body, row = found.end() + 1, (width + 7) // 8
    if kind > 4:
        largest = _PNM_LARGEST.match(start, found.end())
        if largest is None or largest[1] not in (b"255", b"65535"):
            what = "no" if largest is None else largest[1].decode()
            raise BadImage(f"a PNM whose largest value is {what}, which DALI takes for 255 or 65535; convert it")
        row = width * (3 if kind == 6 else 1) * (1 if largest[1] == b"255" else 2)
        body = largest.end() + 1
    if body + row * height > window.num_bytes:
        raise BadImage(f"truncated PNM ({window.num_bytes} of {body + row * height} bytes)")
    return Header(height, width)
