"""Write scikit-learn's real images as image folders: for the demo, the tests and the benchmarks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from data_pipeline.arrays import BoolArray, Int64Array
from data_pipeline.errors import UsageError
from data_pipeline.files import write_json

DIGIT_SIZE = 32  # pixels; scikit-learn's are 8 x 8
PHOTO_SIZE = (500, 375)  # width and height, those of an average ImageNet photograph
MARK = ".mae_scale_sample.json"


def write_digits(root: str | os.PathLike[str]) -> Path:
    """Write scikit-learn's 1,797 handwritten digits as grey 32 x 32 JPEGs: root/train/<digit>/ and
    root/val/<digit>/.

    Every fifth image of each digit is held out. The bytes are the same each time; a folder that holds them already is
    left unchanged. Raises UsageError when `root` holds something else.
    """
    root = Path(root)
    if not begin_sample(root, {"digits": DIGIT_SIZE}):
        return root
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out = held_out_digits(digits.target)
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "val" if held_out[number] else "train"
        folder = root / part / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8))
        large = small.resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC)
        large.save(folder / f"{number:04d}.jpg", quality=95)
    finish_sample(root, {"digits": DIGIT_SIZE})
    return root


def held_out_digits(labels: Int64Array) -> BoolArray:
    """Return which of the digits are for validation, every fifth of each: bool [n] of labels [n]."""
    held_out = np.zeros(len(labels), bool)
    for digit in range(10):
        held_out[np.flatnonzero(labels == digit)[4::5]] = True
    return held_out


def write_photos(root: str | os.PathLike[str], count: int) -> Path:
    """Write `count` random crops of scikit-learn's two photographs as 500 x 375 JPEGs, flat in `root`.

    The bytes are the same each time; a folder that holds them already is left unchanged. Raises UsageError when `root`
    holds something else.
    """
    root = Path(root)
    if not begin_sample(root, {"photos": count}):
        return root
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    random = np.random.Generator(np.random.Philox(0))
    for number in range(count):
        photo = photos[number % len(photos)]
        widest = min(photo.width, photo.height * PHOTO_SIZE[0] // PHOTO_SIZE[1])
        width = int(widest * (0.6 + 0.4 * random.random()))
        height = width * PHOTO_SIZE[1] // PHOTO_SIZE[0]
        x = int((photo.width - width) * random.random())
        y = int((photo.height - height) * random.random())
        crop = photo.resize(PHOTO_SIZE, Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
        crop.save(root / f"{number:06d}.jpg", quality=90)
    finish_sample(root, {"photos": count})
    return root


def begin_sample(root: Path, content: dict[str, int]) -> bool:
    """Create `root`; return False when it holds `content` already. Files of an interrupted call are overwritten."""
    mark, unfinished = root / MARK, root / (MARK + ".unfinished")
    if mark.is_file() and json.loads(mark.read_text()) == content:
        return False
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file; give a folder for the sample images")
    ours = unfinished.is_file() and json.loads(unfinished.read_text()) == content
    if root.is_dir() and any(root.iterdir()) and not ours:
        raise UsageError(f"{root} is not empty and holds other files; give a new folder for the sample images")
    try:
        root.mkdir(parents=True, exist_ok=True)
        write_json(unfinished, content)
    except OSError as error:
        raise UsageError(f"{root} cannot be written to: {error.strerror}; give another folder") from None
    return True


def finish_sample(root: Path, content: dict[str, int]) -> None:
    """Mark `root` as holding all of `content`."""
    write_json(root / MARK, content)
    (root / (MARK + ".unfinished")).unlink()
