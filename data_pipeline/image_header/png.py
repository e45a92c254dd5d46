"""Read the header of a PNG: size and EXIF orientation, whether its end chunk is there; and list its chunks."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from data_pipeline.errors import BadImage
from data_pipeline.image_header.tiff import exif_orientation
from data_pipeline.image_header.window import Header, Window

PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"


def png_header(window: Window) -> tuple[Header, int]:
    """Return the header in the chunks before the image data, and the offset of the second chunk. Raises BadImage."""
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


def late_orientation(window: Window, tail: bytes, tail_start: int) -> int:
    """Return the orientation in an EXIF chunk behind the image data, when it is among a PNG's last bytes, else 1."""
    at = tail.rfind(b"eXIf")
    if at < 4:
        return 1
    end = at + 4 + int.from_bytes(tail[at - 4 : at], "big") + 4
    is_chunk = end <= len(tail) and zlib.crc32(tail[at : end - 4]).to_bytes(4, "big") == tail[end - 4 : end]
    return exif_orientation(window, tail_start + at + 4) if is_chunk else 1


def check_png_end(tail: bytes) -> None:
    """Raise BadImage unless the last bytes of a PNG hold its end chunk."""
    if _PNG_END not in tail:
        raise BadImage("truncated PNG (no end chunk)")


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield (name, content, stored checksum) of a PNG's chunks up to its end; nothing for other images."""
    at = len(PNG_START) if data.startswith(PNG_START) else len(data)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + length
        yield data[at + 4 : at + 8], data[at + 8 : end], data[end : end + 4]
        at = len(data) if data[at + 4 : at + 8] == b"IEND" else end + 4
