"""What an image's first and last bytes tell: its height, width and orientation, and whether it is whole.

Only a few kilobytes of an image are read, so a million images take minutes; nothing is decoded.
"""

from __future__ import annotations

import struct
import zlib

from data_pipeline.image_header import HEAD_BYTES, BadImage, Header, Read, Window
from data_pipeline.other_headers import JP2_START, bmp_header, jp2_header, pnm_header, webp_header
from data_pipeline.tiff_header import TIFF_STARTS, exif_orientation, tiff_header

__all__ = [
    "HEAD_BYTES",
    "IMAGE_SUFFIXES",
    "TAIL_BYTES",
    "BadImage",
    "Header",
    "check_whole",
    "png_chunks",
    "read_header",
]

# Files with these names are images. What a file holds is told by its first bytes, whatever its name.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
TAIL_BYTES = 4096  # some writers pad a JPEG behind its end marker

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})
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
    bytes are no image that DALI decodes, or are not all there.
    """
    if num_bytes == 0:
        raise BadImage("empty file")
    window = Window(read, num_bytes)
    head = window(0, min(HEAD_BYTES, num_bytes))
    if head.startswith(_JPEG_START):
        header, body = _jpeg_header(head, window)
    elif head.startswith(_PNG_START):
        header, body = _png_header(window)
    else:
        header, body = _other_header(head, window), None
    if header.height <= 0 or header.width <= 0:
        raise BadImage(f"its header says {header.height} x {header.width} pixels")
    if body is not None:
        tail_start = max(body, num_bytes - TAIL_BYTES)
        tail = window(tail_start, num_bytes - tail_start) if tail_start < num_bytes else b""
        _check_end(head, tail)
        if head.startswith(_PNG_START) and header.orientation == 1:
            header = header._replace(orientation=_late_png_orientation(window, tail, tail_start))
    return header


def check_whole(data: bytes) -> None:
    """Raise BadImage unless `data` begins as an image does and has its end."""
    if data.startswith((_JPEG_START, _PNG_START)):
        _check_end(data[:8], data[-TAIL_BYTES:])
    else:
        read_header(lambda offset, length: data[offset : offset + length], len(data))


def png_chunks(data: bytes):
    """Yield (name, content, checksum as stored) of a PNG's chunks up to its end; of another image none."""
    at = len(_PNG_START) if data.startswith(_PNG_START) else len(data)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + length
        yield data[at + 4 : at + 8], data[at + 8 : end], data[end : end + 4]
        at = len(data) if data[at + 4 : at + 8] == b"IEND" else end + 4


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


def _check_end(head: bytes, tail: bytes) -> None:
    """Raise BadImage unless the last bytes of a JPEG or PNG hold its end."""
    if head.startswith(_JPEG_START):
        if _JPEG_END not in tail:
            raise BadImage("truncated JPEG (no end marker)")
    elif _PNG_END not in tail:
        raise BadImage("truncated PNG (no end chunk)")


def _jpeg_header(head: bytes, window: Window) -> tuple[Header, int]:
    """What the marker segments up to the first scan say, and where the compressed data begins."""
    at, base, size, orientation, is_exif_read = 2, 0, None, 1, False
    while True:
        here = at - base
        if here + 10 > len(head):
            head, base, here = window(at, HEAD_BYTES), at, 0
            if len(head) < 4:
                raise BadImage("truncated JPEG (its header is not all there)")
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
        elif marker == 0xE1 and not is_exif_read and head[here + 4 : here + 10] == b"Exif\0\0":
            orientation, is_exif_read = exif_orientation(window, at + 10), True
        at += 2 + length
        if marker == 0xDA:
            if size is None:
                raise BadImage("damaged JPEG header (no image size before the image data)")
            return Header(*size, orientation), at


def _png_header(window: Window) -> tuple[Header, int]:
    """What the chunks before the image data say, and where the second chunk begins."""
    start = window(0, 33)
    if len(start) < 33 or start[12:16] != b"IHDR":
        raise BadImage("damaged PNG header")
    width, height = struct.unpack_from(">II", start, 16)
    at, orientation = 33, 1
    while len(chunk := window(at, 8)) == 8 and chunk[4:] not in (b"IDAT", b"IEND"):
        if chunk[4:] == b"eXIf":
            orientation = exif_orientation(window, at + 8)
        at += 12 + int.from_bytes(chunk[:4], "big")
    return Header(height, width, orientation), 33


def _late_png_orientation(window: Window, tail: bytes, tail_start: int) -> int:
    """The orientation in an EXIF chunk behind the image data, where it lies in a PNG's last bytes."""
    at = tail.rfind(b"eXIf")
    if at < 4:
        return 1
    end = at + 4 + int.from_bytes(tail[at - 4 : at], "big") + 4
    is_chunk = end <= len(tail) and zlib.crc32(tail[at : end - 4]).to_bytes(4, "big") == tail[end - 4 : end]
    return exif_orientation(window, tail_start + at + 4) if is_chunk else 1
