"""Label maps: a class for each pixel, read from PNGs and cut as a plan cuts their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.annotations.placing import Placing
from data_pipeline.arrays import Uint8Array
from data_pipeline.errors import BadImage, UsageError, reason_of

IGNORED = 255
"""The label of pixels that count for nothing: not labelled, and beyond the image."""


MOST_CLASSES = 254
"""Numbers that are left for classes in a byte, beside that of no label."""
_ADE20K_HEADING = "Idx\t"


def read_class_names(path: Path) -> list[str]:
    """Return the classes' names: a line each, or the last column of ADE20K's objectInfo150.txt.

    Raises UsageError for a file that cannot be read, is empty, or names too many classes.
    """
    try:
        lines = [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({reason_of(error)}); expected a class's name on each line") from None
    if lines and lines[0].startswith(_ADE20K_HEADING):
        lines = [line.rpartition("\t")[2] for line in lines[1:]]
    if not 0 < len(lines) <= MOST_CLASSES:
        raise UsageError(f"{path} names {len(lines)} classes; expected 1 to {MOST_CLASSES}, one on each line")
    return lines


def read_label_map(path: Path, *, height: int, width: int, classes: int) -> Uint8Array:
    """Return the labels uint8 [height, width] of a PNG: ADE20K's values, where 0 is not labelled and v is class v - 1.

    The file's own numbers are taken, also where it has a palette: its colours are not looked at. Raises BadImage for a
    file that cannot be read, with colours in place of numbers, of another size, or with a value above `classes`.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P"):
                raise BadImage(
                    f"label map {path.name} is of mode {image.mode}; expected one 8-bit number for each pixel"
                )
            values = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all of them for damaged files
        raise BadImage(f"label map {path.name} cannot be read ({reason_of(error)})") from None
    if values.shape != (height, width):
        raise BadImage(
            f"label map {path.name} is {values.shape[1]} x {values.shape[0]} px, its image {width} x {height} px"
        )
    if values.max(initial=0) > classes:
        raise BadImage(f"label map {path.name} has the value {values.max()}; expected at most {classes}")
    return values - np.uint8(1)  # 0 becomes IGNORED


def place_labels(labels: Uint8Array, placing: Placing, image_size: int) -> Uint8Array:
    """Return labels uint8 [H, W] of a stored image in the square output of image_size px, IGNORED beyond the image."""
    placed = np.full((image_size, image_size), IGNORED, np.uint8)
    placed[: placing.filled[0], : placing.filled[1]] = placing.sampled(labels)
    return placed
