"""Read from an image's first and last bytes its height, width and orientation, and whether it is whole.

Only a few kilobytes of an image are read, so a million images take minutes; nothing is decoded.
"""

from __future__ import annotations

from data_pipeline.errors import BadImage
from data_pipeline.image_header.bmp import bmp_header
from data_pipeline.image_header.jpeg import JPEG_START, check_jpeg_end, jpeg_header
from data_pipeline.image_header.jpeg2000 import JP2_START, jp2_header
from data_pipeline.image_header.png import PNG_START, check_png_end, late_orientation, png_header
from data_pipeline.image_header.pnm import pnm_header
from data_pipeline.image_header.tiff import TIFF_STARTS, tiff_header
from data_pipeline.image_header.webp import webp_header
from data_pipeline.image_header.window import HEAD_BYTES, Header, Read, Window

# Files with these suffixes are images. The type follows from the first bytes, whatever the suffix.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
TAIL_BYTES = 4096  # some writers pad a JPEG behind its end marker

_NOT_DECODED = {
    b"GIF8": "a GIF",
    b"P1": "a PNM written as text",
    b"P2": "a PNM written as text",
    b"P3": "a PNM written as text",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x4f\xff\x51": "a JPEG 2000 stream without a .jp2 file around it",
    b"8BPS": "a Photoshop file",
}


def read_header(read: Read, num_bytes: int) -> Header:
    """Return height, width and orientation of an image of `num_bytes` bytes.

    `read(offset, length)` gives at most `length` bytes of the image. Raises BadImage with the reason when the
    bytes are not an image that DALI decodes, or are incomplete.
    """
    if num_bytes == 0:
        raise BadImage("empty file")
    window = Window(read, num_bytes)
    head = window(0, min(HEAD_BYTES, num_bytes))
    if head.startswith(JPEG_START):
        header, body = jpeg_header(head, window)
    elif head.startswith(PNG_START):
        header, body = png_header(window)
    else:
        header, body = _other_header(head, window), None
    if header.height <= 0 or header.width <= 0:
        raise BadImage(f"its header says {header.height} x {header.width} pixels")
    if body is not None:
        tail_start = max(body, num_bytes - TAIL_BYTES)
        tail = window(tail_start, num_bytes - tail_start) if tail_start < num_bytes else b""
        _check_end(head, tail)
        if head.startswith(PNG_START) and header.orientation == 1:
            header = header._replace(orientation=late_orientation(window, tail, tail_start))
    return header


def check_whole(data: bytes) -> None:
    """Raise BadImage unless `data` has the start and the end of an image."""
    if data.startswith((JPEG_START, PNG_START)):
        _check_end(data[:8], data[-TAIL_BYTES:])
    else:
        read_header(lambda offset, length: data[offset : offset + length], len(data))


def _check_end(head: bytes, tail: bytes) -> None:
    if head.startswith(JPEG_START):
        check_jpeg_end(tail)
    else:
        check_png_end(tail)


def _other_header(head: bytes, window: Window) -> Header:
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return webp_header(window)
    if head.startswith(b"BM"):
        return bmp_header(window)
    if head.startswith(TIFF_STARTS):
        return tiff_header(window)
    if head.startswith(JP2_START):
        return jp2_header(window)
    if head[:2] in (b"P4", b"P5", b"P6"):
        return pnm_header(window)
    kind = next((kind for start, kind in _NOT_DECODED.items() if head.startswith(start)), None)
    if kind is None and head[4:8] == b"ftyp":
        kind = f"an image of type {head[8:12].decode('ascii', 'replace')} (AVIF, HEIC or a video)"
    if kind is not None:
        raise BadImage(f"{kind}, which DALI does not decode; convert it, to PNG for example")
    raise BadImage(f"neither JPEG nor PNG nor another image that DALI decodes (begins with {bytes(head[:8])!r})")
