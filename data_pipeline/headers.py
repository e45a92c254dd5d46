"""What a JPEG's or PNG's first and last bytes tell: its height and width, and whether it is whole.

Only a few kilobytes of an image are read, so a million images take minutes; nothing is decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
HEAD_BYTES = 4096  # enough for nearly every header; embedded thumbnails and colour profiles are skipped over
TAIL_BYTES = 4096  # some writers pad a JPEG behind its end marker

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})


class BadImage(Exception):
    """An image that cannot be used; the message is the reason, without the path."""


def image_size(read: Callable[[int, int], bytes], num_bytes: int) -> tuple[int, int]:
    """Height and width in pixels as stored (EXIF orientation ignored) of an image of `num_bytes` bytes.

    `read(offset, length)` gives at most `length` bytes of the image. Raises BadImage with the reason when the
    bytes are no JPEG or PNG, or are not all there.
    """
    if num_bytes == 0:
        raise BadImage("empty file")
    head = read(0, HEAD_BYTES)
    if head.startswith(_JPEG_START):
        height, width, body = _jpeg_size(head, read, num_bytes)
    elif head.startswith(_PNG_START):
        height, width, body = _png_size(head)
    else:
        raise BadImage(f"neither JPEG nor PNG (begins with {head[:8]!r})")
    if height == 0 or width == 0:
        raise BadImage(f"its header says {height} x {width} pixels")
    tail_start = max(body, num_bytes - TAIL_BYTES)
    check_end(head, read(tail_start, num_bytes - tail_start) if tail_start < num_bytes else b"")
    return height, width


def check_end(head: bytes, tail: bytes) -> None:
    """Raise BadImage unless `head` begins as a JPEG or PNG does and `tail` (its last bytes) ends it."""
    if head.startswith(_JPEG_START):
        if _JPEG_END not in tail:
            raise BadImage("truncated JPEG (no end marker)")
    elif head.startswith(_PNG_START):
        if _PNG_END not in tail:
            raise BadImage("truncated PNG (no end chunk)")
    else:
        raise BadImage(f"neither JPEG nor PNG (begins with {bytes(head[:8])!r})")


def _jpeg_size(head: bytes, read: Callable[[int, int], bytes], num_bytes: int) -> tuple[int, int, int]:
    """Height, width and where the compressed data begins; walks the marker segments up to the first scan."""
    at, size, base = 2, None, 0
    while True:
        if at - base + 10 > len(head):
            if at + 4 > num_bytes:
                raise BadImage("truncated JPEG (its header is not all there)")
            head, base = read(at, HEAD_BYTES), at
            if len(head) < 4:
                raise BadImage("truncated JPEG (its header is not all there)")
        here = at - base
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
                raise BadImage("truncated JPEG (its header is not all there)")
            size = struct.unpack_from(">HH", head, here + 5)
        at += 2 + length
        if marker == 0xDA:
            if size is None:
                raise BadImage("damaged JPEG header (no image size before the image data)")
            return size[0], size[1], at


def _png_size(head: bytes) -> tuple[int, int, int]:
    if len(head) < 33 or head[12:16] != b"IHDR":
        raise BadImage("damaged PNG header")
    width, height = struct.unpack_from(">II", head, 16)
    return height, width, 33
