"""The size of an image or a grid of patches: an integer where it is square, else a pair (height, width)."""

from __future__ import annotations

ImageSize = int | tuple[int, int]
"""The side of a square, or (height, width): pixels of an image, or patches of a grid."""


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Return the pair (height, width) of a size in either form."""
    return (size, size) if isinstance(size, int) else size


def shortest_form(size: ImageSize) -> ImageSize:
    """Return the side where the size is square, else (height, width): one form for each size."""
    height, width = height_and_width(size)
    return height if height == width else (height, width)


def size_text(size: ImageSize) -> str:
    """Return a size for a sentence: "224", or "224 x 448" for (height, width)."""
    size = shortest_form(size)
    return str(size) if isinstance(size, int) else f"{size[0]} x {size[1]}"


def size_value(size: ImageSize) -> str:
    """Return a size as a recipe and the command line take it: "224", or "[224,448]" for [height, width]."""
    size = shortest_form(size)
    return str(size) if isinstance(size, int) else f"[{size[0]},{size[1]}]"
