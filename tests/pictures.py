"""Images for tests, written under given names."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number=0, height=220, width=300, mode="RGB", kind="JPEG", **options) -> bytes:
    """About 60 KiB of noise as a JPEG, so that a few images fill a shard of 1 MiB."""
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def put(root: Path, name: str, data: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
