"""Read the header of a JPEG: size and EXIF orientation, and whether its end marker is there."""

from __future__ import annotations

import struct

from data_pipeline.errors import BadImage
from data_pipeline.image_header.tiff import exif_orientation
from data_pipeline.image_header.window import HEAD_BYTES, Header, Window

JPEG_START = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})


def jpeg_header(head: bytes, window: Window) -> tuple[Header, int]:
    """Return the header in the marker segments up to the first scan, and the offset of the compressed data.

    `head` are the first bytes of the window. Raises BadImage.
    """
    at, base, orientation, is_exif_read = 2, 0, 1, False
    size: tuple[int, int] | None = None
    while True:
        here = at - base
        if here + 10 > len(head):
            head, base, here = window(at, HEAD_BYTES), at, 0
            if len(head) < 4:
                raise BadImage("truncated JPEG (its header is incomplete)")
        if head[here] != 0xFF:
            raise BadImage(f"damaged JPEG header (no marker at byte {at})")
        marker = head[here + 1]
        if marker == 0xFF or marker in _JPEG_BARE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker == 0xD9:
            raise BadImage("damaged JPEG (ends before any image data)")
        length = struct.unpack_from(">H", head, here + 2)[0]
        if marker in _JPEG_SIZES and size is None:
            if here + 9 > len(head):
                raise BadImage("truncated JPEG (its header is incomplete)")
            height, width = struct.unpack_from(">HH", head, here + 5)
            size = height, width
        elif marker == 0xE1 and not is_exif_read and head[here + 4 : here + 10] == b"Exif\0\0":
            orientation, is_exif_read = exif_orientation(window, at + 10), True
        at += 2 + length
        if marker == 0xDA:
            if size is None:
                raise BadImage("damaged JPEG header (no image size before the image data)")
            return Header(*size, orientation), at


def check_jpeg_end(tail: bytes) -> None:
    """Raise BadImage unless the last bytes of a JPEG hold its end marker."""
    if _JPEG_END not in tail:
        raise BadImage("truncated JPEG (no end marker)")
