"""Some of an index's images for figures, as they are stored."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

from data_pipeline.arrays import Uint8Array
from data_pipeline.byte_reader import ByteReader
from data_pipeline.errors import BadImage
from data_pipeline.index import Index

SHOWN = 6


def shown_rows(index: Index) -> list[int]:
    """Return the rows of up to SHOWN images, evenly placed over the index."""
    count = min(SHOWN, len(index))
    return np.linspace(0, len(index) - 1, count).round().astype(int).tolist()


def stored_pictures(index: Index, rows: Iterable[int]) -> dict[int, Uint8Array]:
    """Return the pixels of those images that can be read, by row: RGB uint8 [H, W, 3], on the host."""
    reader, found = ByteReader(index), dict[int, Uint8Array]()
    for row in rows:
        with contextlib.suppress(BadImage, OSError, SyntaxError, ValueError):  # what Pillow raises of damaged files
            with Image.open(io.BytesIO(reader.read(row).tobytes())) as image:
                found[row] = np.asarray(image.convert("RGB"))
    return found
