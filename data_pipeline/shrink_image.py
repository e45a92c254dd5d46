"""Re-encode large images as smaller JPEGs for packing, with the filter of training (Pillow's bicubic)."""

from __future__ import annotations

import io
from dataclasses import dataclass

from data_pipeline.errors import BadImage, reason_of

QUALITY = 92  # of a JPEG, by default
JPEG_SUFFIXES = (b"jpg", b"jpeg", b"jpe", b"jfif")
ORIENTATION = 0x0112  # EXIF's tag
EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}  # Pillow's modes that a JPEG can hold


@dataclass(frozen=True)
class Shrinking:
    """The shorter side in pixels to which larger images are reduced, and the quality of their JPEGs."""

    shorter_side: int
    quality: int


def shrunk(data: bytes, shrinking: Shrinking, orientation: int = 1) -> bytes | None:
    """Return the image in `data` as a JPEG with that shorter side; None when it stays unchanged.

    That is when its pixels do not fit into 8 bits, or it is a TIFF with an orientation.

    Bicubic with antialiasing, as in training. Grey stays grey, CMYK becomes RGB, alpha is dropped; a JPEG keeps its
    colour sub-sampling. The pixels stay as stored, and EXIF's `orientation` beside them; other metadata are not kept.
    Raises BadImage when it cannot be decoded.
    """
    from PIL import Image, JpegImagePlugin

    Image.MAX_IMAGE_PIXELS = None  # large photographs are expected here
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in EIGHT_BIT or (image.format == "TIFF" and orientation != 1):  # Pillow would turn it
                return None
            sampling = max(0, JpegImagePlugin.get_sampling(image)) if image.format == "JPEG" else 0  # 0: 4:4:4
            grey = image.mode in ("1", "L", "LA")
            pixels = image.convert("RGBA") if image.mode in ("P", "PA") else image
            pixels = pixels.convert("L" if grey else "RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and others on damaged data
        raise BadImage(f"cannot be decoded: {reason_of(error)}") from None
    shorter = min(pixels.size)
    size = tuple((2 * side * shrinking.shorter_side + shorter) // (2 * shorter) for side in pixels.size)
    pixels = pixels.resize(size, Image.Resampling.BICUBIC)
    pixels.info.clear()
    file = io.BytesIO()
    exif = Image.Exif()
    if orientation != 1:
        exif[ORIENTATION] = orientation
    pixels.save(file, "JPEG", quality=shrinking.quality, subsampling=sampling, exif=exif)
    return file.getvalue()
