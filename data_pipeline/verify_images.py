"""Check indexed images: that their bytes are as indexed, and, by decoding each of them whole, that they are sound.

Deep checks are strict: whatever libjpeg, libtiff or libpng report is damage even though they decode it, and so is a
wrong checksum in a PNG. Bytes behind a JPEG's end marker are not. No decoder sees damage that leaves a readable stream,
such as one wrong bit of a photograph or of uncompressed pixels.
"""

from __future__ import annotations

import functools
import os
import zlib
from itertools import pairwise

import numpy as np

from data_pipeline.dali_errors import machine_failure, names_an_image, reason_in
from data_pipeline.dali_graph import import_dali
from data_pipeline.decoder import WholeDecoder
from data_pipeline.decoder_stderr import caught
from data_pipeline.errors import BadImage, reason_of
from data_pipeline.image_header.png import png_chunks
from data_pipeline.image_header.read import read_header
from data_pipeline.image_header.window import reader_of
from data_pipeline.index import Index
from data_pipeline.index_rows import Rows
from data_pipeline.index_scan import ONE_PROCESS_IMAGES
from data_pipeline.process_pool import Progress, available_cores, run_tasks

CHUNK_IMAGES, CHUNK_DECODED = 1000, 50  # images per task: enough to be cheap, few enough for the bar to move
ONE_PROCESS_DECODED = 250


def verify(
    index: Index, deep: bool = False, *, workers: int | None = None, progress: Progress = True
) -> list[tuple[str, str]]:
    """Return (name, reason) of every image that differs from the index: in bytes, size, start or end.

    `deep` also decodes each image, whole and strictly. Raises UsageError when that needs DALI and it is missing.
    """
    bounds = [*range(0, len(index), CHUNK_DECODED if deep else CHUNK_IMAGES), len(index)]
    if deep:
        import_dali()
    tasks = [
        (str(index.root), index.shard_names, index.rows.slice(first, last), deep) for first, last in pairwise(bounds)
    ]
    counts = [len(rows) for _, _, rows, _ in tasks]
    if workers is None and len(index) <= (ONE_PROCESS_DECODED if deep else ONE_PROCESS_IMAGES):
        workers = 1
    if workers is None and deep:
        workers = available_cores()  # decoding, unlike reading headers, keeps each of them busy
    parts = run_tasks("verifying images", check_images, tasks, counts, workers=workers, progress=progress)
    return [found for part in parts for found in part]


def check_images(task: tuple[str, list[str], Rows, bool]) -> list[tuple[str, str]]:
    """Return (name, reason) of images that differ from the index; the task is (root, shards, rows, deep)."""
    root, shards, rows, deep = task
    found = []
    for row in range(len(rows)):
        shard, size, offset, height, width = (
            int(rows.columns[name][row]) for name in ("shard", "num_bytes", "offset", "height", "width")
        )
        inside = rows.name(row) if shard < 0 else os.fsencode(shards[shard])
        try:
            with open(os.path.join(os.fsencode(root), inside), "rb", buffering=0) as file:
                there = os.fstat(file.fileno()).st_size
                if (shard < 0 and there != size) or there < offset + size:
                    raise BadImage(f"{there} bytes, expected {offset + size}")
                read = reader_of(file.fileno(), offset, size)
                now = read_header(read, size)
                if (now.height, now.width) != (height, width):
                    raise BadImage(f"{now.height} x {now.width} pixels, expected {height} x {width}")
                if deep:
                    check_pixels(read(0, size), height, width)
        except (BadImage, OSError) as error:
            found.append((rows.shard_name(shards, row), reason_of(error)))
    return found


@functools.cache
def _decoder() -> WholeDecoder:
    """Return this process's decoder."""
    return WholeDecoder()


def check_pixels(data: bytes, height: int, width: int) -> None:
    """Decode an image whole. Raises BadImage when a decoder refuses it or reports damage, or its size differs."""
    for name, content, checksum in png_chunks(data):
        if zlib.crc32(name + content).to_bytes(4, "big") != checksum:
            raise BadImage(f"damaged PNG (checksum of its chunk {name.decode('ascii', 'replace')})")
    refused = None
    with caught() as damage:
        try:
            found = _decoder().size(np.frombuffer(data, np.uint8))
        except RuntimeError as error:
            if not names_an_image(error):
                raise machine_failure(error, 1, None) from error
            refused = reason_in(error)
    if refused:
        raise BadImage(f"cannot be decoded ({damage[0] if damage else refused})")
    if damage:
        raise BadImage(damage[0])
    if found != (height, width):
        raise BadImage(f"decoded to {found[0]} x {found[1]} pixels, expected {height} x {width} by its header")
