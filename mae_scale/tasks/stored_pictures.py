"""Some of an index's images for figures, as they are stored."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from data_pipeline.arrays import Uint8Array
from data_pipeline.byte_reader import ByteReader
from data_pipeline.index import Index

SHOWN = 6


def shown_rows(index: Index) -> list[int]:
    """Return the rows of up to SHOWN images, evenly placed over the index."""
    count = min(SHOWN, len(index))
    return np.linspace(0, len(index) - 1, count).round().astype(int).tolist()


def stored_picture(index: Index, row: int) -> Uint8Array:
    """Return an image's pixels, RGB uint8 [H, W, 3], on the host. Raises BadImage or OSError."""
    encoded = ByteReader(index).read(row)
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        return np.asarray(image.convert("RGB"))
