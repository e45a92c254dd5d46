"""Photographs in every image type that is read, and in kinds of them that are refused, as Pillow writes them."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIZE = (96, 64)  # width and height
JPEG_LIKE = {"quality": 90}


def photo() -> Image.Image:
    """A small colour photograph."""
    return Image.fromarray(load_sample_images().images[0]).resize(SIZE)


def with_alpha() -> Image.Image:
    """The photograph with an opacity that rises from left to right."""
    image = photo()
    image.putalpha(Image.linear_gradient("L").resize(SIZE))
    return image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """An image file's bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sixteen_bits() -> Image.Image:
    """Grey, 16 bits a pixel."""
    grey = np.asarray(photo().convert("L")).astype(np.uint16)
    return Image.fromarray((grey * 257 + 100 * (grey < 200)).astype(np.uint16))


# By file name: what is read and, decoded, equals Pillow's convert("RGB").
READ: dict[str, Callable[[], bytes]] = {
    "photo.jpeg": lambda: encoded(photo(), "JPEG", **JPEG_LIKE),
    "photo.jfif": lambda: encoded(photo(), "JPEG", progressive=True, **JPEG_LIKE),
    "cmyk.jpg": lambda: encoded(photo().convert("CMYK"), "JPEG", **JPEG_LIKE),
    "photo.png": lambda: encoded(photo(), "PNG"),
    "alpha.png": lambda: encoded(with_alpha(), "PNG"),
    "palette.png": lambda: encoded(photo().quantize(32), "PNG"),
    "grey_alpha.png": lambda: encoded(with_alpha().convert("LA"), "PNG"),
    "lossy.webp": lambda: encoded(photo(), "WEBP", quality=80),
    "lossless.webp": lambda: encoded(photo(), "WEBP", lossless=True),
    "alpha.WEBP": lambda: encoded(with_alpha(), "WEBP", lossless=True, exact=True),
    "animated.webp": lambda: encoded(
        photo(), "WEBP", save_all=True, append_images=[photo().rotate(180)], lossless=True
    ),
    "photo.bmp": lambda: encoded(photo(), "BMP"),
    "alpha.bmp": lambda: encoded(with_alpha(), "BMP"),
    "grey.bmp": lambda: encoded(photo().convert("L"), "BMP"),
    "palette.bmp": lambda: encoded(photo().quantize(32), "BMP"),
    "photo.tif": lambda: encoded(photo(), "TIFF"),
    "lzw.tiff": lambda: encoded(photo(), "TIFF", compression="tiff_lzw"),
    "jpeg.tiff": lambda: encoded(photo(), "TIFF", compression="jpeg"),
    "big.tiff": lambda: encoded(photo(), "TIFF", big_tiff=True),
    "alpha.tiff": lambda: encoded(with_alpha(), "TIFF", compression="tiff_adobe_deflate"),
    "grey.tiff": lambda: encoded(photo().convert("L"), "TIFF"),
    "palette.tiff": lambda: encoded(photo().quantize(32), "TIFF"),
    "fax.tiff": lambda: encoded(photo().convert("1"), "TIFF", compression="group4"),
    "pages.tiff": lambda: encoded(photo(), "TIFF", save_all=True, append_images=[photo().resize((10, 20))]),
    "photo.jp2": lambda: encoded(photo(), "JPEG2000"),
    "lossy.jp2": lambda: encoded(photo(), "JPEG2000", irreversible=True, quality_layers=[20]),
    "grey.jp2": lambda: encoded(photo().convert("L"), "JPEG2000"),
    "alpha.jp2": lambda: encoded(with_alpha(), "JPEG2000"),
    "photo.ppm": lambda: encoded(photo(), "PPM"),
    "grey.pgm": lambda: encoded(photo().convert("L"), "PPM"),
    "one_bit.pbm": lambda: encoded(photo().convert("1"), "PPM"),
}
# Scaled to 8 bits, where Pillow's convert("RGB") would cut everything above 255 off.
DEEP: dict[str, Callable[[], bytes]] = {
    "deep.png": lambda: encoded(sixteen_bits(), "PNG"),
    "deep.tiff": lambda: encoded(sixteen_bits(), "TIFF"),
    "deep.pgm": lambda: encoded(sixteen_bits(), "PPM"),
    "deep.jp2": lambda: encoded(sixteen_bits(), "JPEG2000"),
}
# Named as images, and refused with a reason that has this in it.
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "gif.jpg": (lambda: encoded(photo(), "GIF"), "a GIF, which DALI does not decode"),
    "avif.png": (lambda: encoded(photo(), "AVIF"), "AVIF, HEIC"),
    "grey_alpha.tiff": (lambda: encoded(with_alpha().convert("LA"), "TIFF"), "grey with 2 samples"),
    "cmyk.tiff": (lambda: encoded(photo().convert("CMYK"), "TIFF"), "CMYK"),
    "float.tiff": (lambda: encoded(photo().convert("F"), "TIFF"), "32 bits"),
    "cmyk.jp2": (lambda: encoded(photo().convert("CMYK"), "JPEG2000"), "4 channels"),
    "grey_alpha.jp2": (lambda: encoded(with_alpha().convert("LA"), "JPEG2000"), "2 channels"),
    "stream.jp2": (lambda: encoded(photo(), "JPEG2000", no_jp2=True), "without a .jp2 file"),
    "odd.pgm": (lambda: b"P5 96 64 100\n" + bytes(96 * 64), "largest value is 100"),
    "text.ppm": (lambda: b"P3 1 1 255\n1 2 3\n", "written as text"),
}


def write_all(folder: Path, kinds: dict[str, Callable[[], bytes]]) -> list[Path]:
    """Write these files; their paths in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in kinds.items():
        (folder / name).write_bytes(make())
    return sorted(folder / name for name in kinds)
