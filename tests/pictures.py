"""Images for tests, in folders and shards, and their index."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.index_build import build_index


def picture(number=0, height=220, width=300, mode="RGB", kind="JPEG", **options) -> bytes:
    """About 60 KiB of noise as a JPEG, so that a few images fill a shard of 1 MiB."""
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def small(height=40, width=60, **options) -> bytes:
    """A few KiB of noise, another for each size."""
    return picture(height * 1000 + width, height, width, **options)


def put(root: Path, name: str, data: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def index_of(root: Path, **options):
    return build_index(root, workers=1, progress=False, **options)


def names(index) -> list[str]:
    return [index.name(image) for image in range(len(index))]
