"""The cache on the node's disk: never a wrong byte, never more than its bound, and never a reason to stop."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline import cache as cache_module
from data_pipeline.bad_images import BadImagePolicy
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import TrainingOrder
from data_pipeline.byte_reader import ByteReader
from data_pipeline.cache import FREE_SHARE, ImageCache
from data_pipeline.errors import BadImage
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from tests.loaders import on_cpu

STEPS, BATCH = 5, 71  # 355 images: an epoch without a remainder


@pytest.fixture
def index(digits, tmp_path):
    """Of a copy of the images that a test may damage or remove."""
    shutil.copytree(digits / "val", tmp_path / "source")
    return build_index(tmp_path / "source", progress=False)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "disk" / "cache"


def order_of(epoch: int) -> TrainingOrder:
    return TrainingOrder(batch_layout(BATCH), seed=5, start_step=epoch * STEPS, stop_step=(epoch + 1) * STEPS)


def batches(index, cache=None, epoch=0, **options) -> list:
    with ImageLoader(index, order_of(epoch), on_cpu(16), cache=cache, **options) as loader:
        return list(loader)


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.images, b.images) and np.array_equal(a.sample_ids, b.sample_ids)
        for a, b in zip(one, other, strict=True)
    )


def hits(found: list) -> int:
    return sum(batch.cache_hits for batch in found)


def cached_files(folder) -> dict:
    """Image to file."""
    return {int(file.name): file for file in folder.glob("*/??/*")}


def all_are_whole(folder, index) -> bool:
    reader = ByteReader(index)
    return all(
        file.read_bytes()[:-4] == reader.read(image).tobytes() and file.stat().st_size == index.num_bytes[image] + 4
        for image, file in cached_files(folder).items()
    )


def test_from_the_second_epoch_on_nothing_is_read_from_the_source(index, folder, caplog):
    expected = [batches(index, epoch=epoch) for epoch in range(3)]
    first = batches(index, ImageCache(folder, index))
    assert hits(first) == hits(expected[0]) == 0
    index.root.rename(index.root.with_name("gone"))
    cache = ImageCache(folder, index)
    later = [batches(index, cache, epoch) for epoch in (1, 2)]
    assert all(same(a, b) for a, b in zip([first, *later], expected, strict=True))
    assert [hits(found) for found in later] == [len(index)] * 2
    assert sum(batch.replaced for found in later for batch in found) == 0
    assert list(folder.glob("*/filling-*")) == []
    assert caplog.text == ""


def test_another_index_has_its_own_images(index, folder):
    batches(index, ImageCache(folder, index))
    image = index.path(0)
    os.utime(image, ns=(0, 0))
    later = build_index(index.root, progress=False)
    assert hits(batches(later, ImageCache(folder, later))) == 0


FILLING = """
import itertools, sys, time
from data_pipeline import cache
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import TrainingOrder
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from tests.loaders import on_cpu
root, folder, whole, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
checksum, files = cache._checksum, itertools.count()
# Between the two parts of a file that is written, and before one is found: a moment, and for ever after `whole` files.
cache._checksum = lambda data: time.sleep(0.002 if next(files) < whole else 600) or checksum(data)
index = build_index(root, progress=False)
for _ in range(rounds):
    order = TrainingOrder(batch_layout(71), seed=5, stop_step=5)
    with ImageLoader(index, order, on_cpu(16), cache=cache.ImageCache(folder, index)) as loader:
        print(sum(batch.cache_hits for batch in loader), flush=True)
"""


def filling(index, folder, whole=10**6, rounds=1) -> subprocess.Popen:
    """Another process that fills the cache; it hangs in the middle of each file after so many."""
    command = [sys.executable, "-c", FILLING, str(index.root), str(folder), str(whole), str(rounds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_fill_the_same_cache_at_once(index, folder):
    both = [filling(index, folder, rounds=3) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert out.splitlines()[1:] == [str(len(index))] * 2
    assert sorted(cached_files(folder)) == list(range(len(index)))
    assert all_are_whole(folder, index)
    assert list(folder.glob("*/filling-*")) == []


def test_a_process_killed_while_filling_leaves_nothing_wrong_and_nothing_behind(index, folder):
    expected = batches(index)
    for whole in (10, 150):
        process = filling(index, folder, whole)
        while len(cached_files(folder)) < whole or not list(folder.glob("*/filling-*/*")):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
        assert len(cached_files(folder)) == whole
        assert all_are_whole(folder, index)
    found = batches(index, ImageCache(folder, index))
    assert same(found, expected)
    assert hits(found) == whole
    assert list(folder.glob("*/filling-*")) == []
    assert hits(batches(index, ImageCache(folder, index))) == len(index)


def test_what_a_living_process_is_writing_is_not_removed(index, folder):
    living = ImageCache(folder, index)
    reader = ByteReader(index)
    living.read(0, reader.read)
    batches(index, ImageCache(folder, index))
    assert len(list(folder.glob("*/filling-*"))) == 1
    (file,) = [file for image, file in cached_files(folder).items() if image == 7]
    file.unlink()
    living.read(7, reader.read)
    assert file.exists()
    living.close()


def flip(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


SPOILT = {
    "flipped": flip,
    "flipped checksum": lambda data: data[:-1] + bytes([data[-1] ^ 128]),
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "short": lambda data: data[:-1],
    "long": lambda data: data + b"x",
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_cached_file_with_wrong_content_is_read_and_written_again(index, folder, spoil):
    expected = batches(index)
    batches(index, ImageCache(folder, index))
    for image, file in cached_files(folder).items():
        if image % 3 == 0:
            file.write_bytes(spoil(file.read_bytes()))
    found = batches(index, ImageCache(folder, index))
    assert same(found, expected)
    assert hits(found) == len(index) - len(range(0, len(index), 3))
    assert all_are_whole(folder, index)


def is_a_file(folder, monkeypatch):
    folder.parent.mkdir()
    folder.write_bytes(b"")


def is_full(folder, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = [0]

    def opening(path, mode):
        opened[0] += 1
        return Full() if opened[0] == 100 else open(path, mode)

    monkeypatch.setattr(cache_module, "open", opening, raising=False)


def is_read_only(folder, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache_module.tempfile, "mkdtemp", refuse)


def has_no_locks(folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache_module.fcntl, "flock", refuse)


def has_little_room(folder, monkeypatch):
    calls = [0]

    def little(path):
        calls[0] += 1
        free = FREE_SHARE if calls[0] < 100 else FREE_SHARE - 0.01
        return SimpleNamespace(f_bavail=round(free * 2**20), f_blocks=2**20, f_frsize=4096)

    monkeypatch.setattr(cache_module.os, "statvfs", little)


BROKEN = {
    is_a_file: "cannot be written to",
    is_full: "cannot be written to (No space left on device)",
    is_read_only: "cannot be written to (Read-only file system)",
    has_no_locks: "cannot be written to (No locks available)",
    has_little_room: "is full: 10% of its disk, 0.4 GiB, stays free",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_or_full_disk_is_one_warning_and_the_source_is_read(index, folder, broken, monkeypatch, caplog):
    expected = [batches(index, epoch=epoch) for epoch in range(2)]
    broken(folder, monkeypatch)
    cache = ImageCache(folder, index)
    found = [batches(index, cache, epoch) for epoch in range(2)]
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"data.cache {folder} {BROKEN[broken]}" in caplog.text
    there = len(cached_files(folder))
    assert hits(found[1]) == there
    if broken in (is_full, has_little_room):
        assert 99 <= there < 150  # the other threads may be about to write too
    else:
        assert there == 0
    assert list(folder.glob("*/filling-*/*")) == []


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1,000 KiB, for the few who may mount one."""
    disk = tmp_path / "small"
    disk.mkdir()
    mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", disk], capture_output=True)
    if mounting.returncode:
        pytest.skip("a file system can only be mounted by root")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("free_share", "message"), [(0.1, "is full: 10% of its disk"), (0.0, "(No space left on device)")]
)
def test_a_small_disk_is_filled_up_to_the_share_kept_free(index, small_disk, free_share, message, monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "FREE_SHARE", free_share)
    expected = [batches(index, epoch=epoch) for epoch in range(2)]
    cache = ImageCache(small_disk / "cache", index)
    assert all(same(batches(index, cache, epoch), expected[epoch]) for epoch in range(2))
    there = cached_files(small_disk / "cache")
    disk = os.statvfs(small_disk)
    in_flight = 16 * 4096  # what several threads have written since each looked
    assert free_share * 1000 * 1024 - in_flight <= disk.f_bavail * disk.f_frsize <= free_share * 1000 * 1024 + 4096
    assert 200 < len(there) < len(index)
    assert all_are_whole(small_disk / "cache", index)
    assert len(caplog.records) == 1
    assert message in caplog.text


def test_a_disk_that_cannot_be_read_is_one_warning_and_the_source_is_read(index, folder, caplog):
    expected = batches(index)
    batches(index, ImageCache(folder, index))
    file = cached_files(folder)[int(expected[0].sample_ids[0])]
    file.unlink()
    file.mkdir()  # reading it is an error, unlike a file that is not there
    cache = ImageCache(folder, index)
    found = batches(index, cache)
    assert same(found, expected)
    assert hits(found) < 50  # of reads that were in flight: a failing disk is not asked again
    assert len(caplog.records) == 1
    assert f"data.cache {folder} cannot be read (Is a directory); the images are read from {index.root}" in caplog.text


def test_a_cache_that_vanishes_is_one_warning_and_the_source_is_read(index, folder, caplog):
    expected = batches(index)
    cache = ImageCache(folder, index)
    with ImageLoader(index, order_of(0), on_cpu(16), prefetch=1, cache=cache) as loader:
        found = []
        for batch in loader:
            found.append(batch)
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.1)
    assert same(found, expected)
    assert len(caplog.records) == 1
    assert "cannot be written to (No such file or directory)" in caplog.text


@pytest.mark.parametrize("limit_gib", [2**-11, 2**-20, 1])
def test_the_size_on_disk_stays_within_the_bound(index, folder, limit_gib):
    cache = ImageCache(folder, index, limit_gib=limit_gib)
    for epoch in range(3):
        found = batches(index, cache, epoch)
    sizes = [-(-file.stat().st_size // 4096) * 4096 for file in cached_files(folder).values()]
    assert sum(sizes) <= limit_gib * 2**30
    assert min(sum(sizes) + 8192, limit_gib * 2**30) >= min(limit_gib * 2**30, 4096 * len(index))
    assert hits(found) == len(sizes)
    again = batches(index, ImageCache(folder, index, limit_gib=limit_gib))  # another process chooses the same images
    assert hits(again) == len(sizes)
    assert len(cached_files(folder)) == len(sizes)


def test_a_bad_image_is_bad_and_is_read_again_when_it_is_restored(index, folder, caplog):
    expected = batches(index)
    missing, garbled = (int(image) for image in expected[2].sample_ids[:2])
    good = {image: index.path(image).read_bytes() for image in (missing, garbled)}
    index.path(missing).unlink()
    data = bytearray(good[garbled])
    at = data.index(b"\xff\xc4")
    data[at + 5 : at + 21] = b"\xff" * 16
    index.path(garbled).write_bytes(data)
    plain = batches(index, bad_images=BadImagePolicy(0.5))
    for _ in range(2):
        found = batches(index, ImageCache(folder, index), bad_images=BadImagePolicy(0.5))
        assert same(found, plain)
        assert sum(batch.replaced for batch in found) == 2
        assert not {missing, garbled} & cached_files(folder).keys()
    with pytest.raises(BadImage, match="missing"):
        ImageCache(folder, index).read(missing, ByteReader(index).read)
    for image, content in good.items():
        index.path(image).write_bytes(content)
    found = batches(index, ImageCache(folder, index))
    assert same(found, expected)
    assert hits(found) == len(index) - 2
