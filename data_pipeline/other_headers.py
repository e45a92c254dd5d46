"""The headers of WebP, BMP, JPEG 2000 (.jp2) and PNM: size, orientation, and whether all bytes are there.

Refused is what DALI decodes otherwise than it is stored, or not at all (seen with DALI 2.4), with the reason. Of an
animation the first frame counts.
"""

from __future__ import annotations

import re
import struct

from data_pipeline.image_header import HEAD_BYTES, BadImage, Header, Window
from data_pipeline.tiff_header import exif_orientation

JP2_START = b"\0\0\0\x0cjP  \r\n\x87\n"
_VP8_START, _VP8L_START = b"\x9d\x01\x2a", 0x2F
_WEBP_EXIF = 0x08
_RGB_MASKS = (0xFF0000, 0xFF00, 0xFF)
_CMYK = 12
_PNM = re.compile(rb"P([456])((?:\s+|#[^\n]*\n)+)(\d+)((?:\s+|#[^\n]*\n)+)(\d+)")
_PNM_LARGEST = re.compile(rb"(?:\s+|#[^\n]*\n)+(\d+)")


def webp_header(window: Window) -> Header:
    """Return what a WebP's header says. Raises BadImage."""
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


def bmp_header(window: Window) -> Header:
    """Return what a BMP's header says. Raises BadImage."""
    start = window.whole(0, 26, "BMP")
    body, size = struct.unpack_from("<II", start, 10)
    compression = data = 0
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", start, 18)
    else:
        start = window.whole(0, 54, "BMP")
        width, height, _, bits, compression, data = struct.unpack_from("<iiHHII", start, 18)
    height = abs(height)  # negative: the rows from the top down
    end = body + (data if compression in (1, 2) else (width * bits + 31) // 32 * 4 * height)  # 1, 2: run lengths
    if width < 0 or bits not in (1, 4, 8, 24, 32) or compression not in (0, 1, 2, 3):
        raise BadImage(f"a BMP of {bits} bits a pixel, compression {compression}; convert it to 24 bits")
    if compression == 3 and struct.unpack("<III", window.whole(54, 12, "BMP")) != _RGB_MASKS:
        raise BadImage("a BMP with its colours in an unusual order; convert it to 24 bits")
    if end > window.num_bytes:
        raise BadImage(f"truncated BMP ({window.num_bytes} of {end} bytes)")
    return Header(height, width)


def jp2_header(window: Window) -> Header:
    """Return what a JPEG 2000 file's boxes say. Raises BadImage."""
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
            f"a JPEG 2000 image of {channels} channels, {(depth & 0x7F) + 1} bits a sample, colour kind {colours}, "
            "which DALI does not decode as it is stored; convert it to 8-bit RGB"
        )
    tail = max(at, end - HEAD_BYTES)
    if b"\xff\xd9" not in window(tail, end - tail):
        raise BadImage("truncated JPEG 2000 image (no end marker)")
    return Header(height, width)


def _boxes(window: Window, at: int, end: int):
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


def pnm_header(window: Window) -> Header:
    """Return what the header of a binary PBM, PGM or PPM says. Raises BadImage."""
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
