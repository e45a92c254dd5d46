"""Read TIFF directories: the header of a TIFF image, and the orientation in the EXIF block of any other.

Kinds that DALI decodes wrongly or not at all (seen with DALI 2.4) are refused: grey with alpha, palettes with alpha,
inverted grey, CMYK, separate colour planes, numbers that are not unsigned 8 or 16 bits. Of several pages the first is
used.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from data_pipeline.errors import BadImage
from data_pipeline.image_header.window import Header, Window

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MOST_ENTRIES = 4096
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS, _SAMPLES = 256, 257, 258, 259, 262, 277
_ORIENTATION, _PLANES, _FORMAT, _JPEG_TABLES = 274, 284, 339, 347
_PLACES = ((273, 279), (324, 325))  # offsets and byte counts of strips, of tiles
_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
_JPEG_COMPRESSED = 7
_GREY, _RGB, _PALETTE, _YCBCR = 1, 2, 3, 6
_NO_COLOURS = -1
_KINDS = {
    _NO_COLOURS: "unnamed colours",
    0: "inverted grey",
    1: "grey",
    2: "RGB",
    3: "a palette",
    5: "CMYK",
    6: "YCbCr",
    8: "CIELab",
}


class _Entry(NamedTuple):
    kind: int
    values: int
    at: int  # offset of its field for a value, or for the offset of one
    place: bytes


def tiff_header(window: Window) -> Header:
    """Return the header of the first page. Raises BadImage when it is damaged, truncated or of a refused kind."""
    entries, order, end = _directory(window, 0)
    window.whole(end, 4, "TIFF")  # the offset of the next page
    tables = entries.get(_JPEG_TABLES)
    if tables is not None and struct.unpack(order + "I", tables.place[:4])[0] + tables.values > window.num_bytes:
        raise BadImage("truncated TIFF (its JPEG tables are incomplete)")
    numbers = {tag: _numbers(window, entries[tag], order) for tag in (_WIDTH, _HEIGHT) if tag in entries}
    if len(numbers) < 2:
        raise BadImage("damaged TIFF header (no width or height)")
    for places, lengths in _PLACES:
        if places in entries and lengths in entries:
            offsets, sizes = (_numbers(window, entries[tag], order) for tag in (places, lengths))
            if any(at + size > window.num_bytes for at, size in zip(offsets, sizes, strict=False)):
                raise BadImage("truncated TIFF (image data beyond the end of the file)")
    values = {tag: _numbers(window, entry, order) for tag, entry in entries.items() if tag in _CHECKED}
    if problem := _unfit(values):
        raise BadImage(f"{problem}, which DALI does not decode as it is stored; convert it to 8-bit RGB")
    return Header(numbers[_HEIGHT][0], numbers[_WIDTH][0], _orientation(entries, order))


def exif_orientation(window: Window, at: int) -> int:
    """Return the orientation, 1 to 8, in the EXIF block (a TIFF without image) at this offset; 1 when it has none.

    The first 16 bits of the entry's value are used, whatever its type, as in DALI, which turns the image.
    """
    try:
        entries, order, _ = _directory(window, at)
    except BadImage:
        return 1
    return _orientation(entries, order)


_CHECKED = (_BITS, _COMPRESSION, _COLOURS, _SAMPLES, _PLANES, _FORMAT)


def _unfit(values: dict[int, list[int]]) -> str | None:
    """Return the kind of the TIFF when DALI would decode it wrongly, else None."""
    samples, colours = values.get(_SAMPLES, [1])[0], values.get(_COLOURS, [_NO_COLOURS])[0]
    bits = values.get(_BITS, [])
    jpeg = values.get(_COMPRESSION, [1])[0] == _JPEG_COMPRESSED
    if not bits or len(set(bits)) > 1 or bits[0] not in ((1, 4, 8) if colours == _PALETTE else (1, 8, 16)):
        return f"a TIFF of {max(bits)} bits per sample" if bits else "a TIFF without bits per sample"
    if any(kind != 1 for kind in values.get(_FORMAT, [])):
        return "a TIFF of signed or floating-point numbers"
    allowed = {_GREY: (1,), _PALETTE: (1,), _RGB: (3, 4), _YCBCR: (3,) if jpeg else ()}.get(colours, ())
    if samples not in allowed:
        return f"a TIFF of {_KINDS.get(colours, colours)} with {samples} samples per pixel"
    if samples > 1 and values.get(_PLANES, [1])[0] != 1:
        return "a TIFF with separate colour planes"
    return None


def _directory(window: Window, base: int) -> tuple[dict[int, _Entry], str, int]:
    """Return the first directory's entries by tag, the byte order as `struct` names it, and where the entries end."""
    start = window.whole(base, 16 if window(base, 4)[2:] in (b"+\0", b"\0+") else 8, "TIFF")
    if start[:4] not in TIFF_STARTS:
        raise BadImage("damaged TIFF header")
    order = "<" if start[:1] == b"I" else ">"
    big = start[:4] in TIFF_STARTS[2:]
    first = base + struct.unpack_from(order + ("Q" if big else "I"), start, 8 if big else 4)[0]
    counter, size, value = (8, 20, 12) if big else (2, 12, 8)
    count = int.from_bytes(window.whole(first, counter, "TIFF"), "little" if order == "<" else "big")
    if count > MOST_ENTRIES:
        raise BadImage(f"damaged TIFF header ({count} entries)")
    table = window.whole(first + counter, count * size, "TIFF")
    entries: dict[int, _Entry] = {}
    for at in range(0, count * size, size):
        tag, kind = struct.unpack_from(order + "HH", table, at)
        number = struct.unpack_from(order + ("Q" if big else "I"), table, at + 4)[0]
        entries.setdefault(tag, _Entry(kind, number, first + counter + at + value, table[at + value : at + size]))
    return entries, order, first + counter + len(table)


def _numbers(window: Window, entry: _Entry, order: str) -> list[int]:
    letter = _TYPES.get(entry.kind)
    if letter is None or not entry.values:
        raise BadImage("damaged TIFF header (a number is of an unknown type)")
    size = entry.values * struct.calcsize(order + letter)
    data = entry.place[:size]
    if size > len(entry.place):
        offset = struct.unpack(order + ("Q" if len(entry.place) == 8 else "I"), entry.place)[0]
        if size > window.num_bytes:
            raise BadImage("damaged TIFF header (an entry is longer than the file)")
        data = window.whole(offset, size, "TIFF")
    return list(struct.unpack(f"{order}{entry.values}{letter}", data))


def _orientation(entries: dict[int, _Entry], order: str) -> int:
    if _ORIENTATION not in entries:
        return 1
    found = struct.unpack_from(order + "H", entries[_ORIENTATION].place)[0]
    return found if 1 <= found <= 8 else 1
