"""An index is built by any number of processes, refreshed where files have changed, and refused for other data."""

import os
import subprocess
import sys
import time

import pytest

from data_pipeline.errors import UsageError
from data_pipeline.index_build import build_index, open_index
from tests.pictures import index_of, put, small, write_shard


def test_any_number_of_processes_gives_the_same_index(folder):
    one, two = index_of(folder), build_index(folder, workers=2, progress=False)
    assert one.digest() == two.digest()


def test_refresh_reads_only_what_changed(folder):
    first = open_index(folder, progress=False)
    assert first.rows.read == 12
    assert open_index(folder, progress=False).rows.read == 0
    put(folder, "a/new.jpg", small(99, 98))
    put(folder, "b/02.jpg", small(77, 76))
    put(folder, "c/bad.jpg", b"bad")
    (folder / "a" / "01.jpg").unlink()
    second = open_index(folder, progress=False)
    assert second.rows.read == 3
    assert second.digest() == index_of(folder).digest()
    assert [name for name, _ in second.unreadable] == ["c/bad.jpg"]
    third = open_index(folder, progress=False)
    assert (third.rows.read, third.unreadable, third.digest()) == (0, second.unreadable, second.digest())
    put(folder, "c/bad.jpg", small())
    assert open_index(folder, progress=False).unreadable == []


def test_without_refresh_the_index_stays_what_it_was(folder):
    first = open_index(folder, progress=False)
    put(folder, "a/new.jpg", small())
    assert open_index(folder, refresh=False).digest() == first.digest()


def test_moved_data_keep_their_index(folder, tmp_path):
    first = open_index(folder, progress=False)
    folder.rename(tmp_path / "moved")
    again = open_index(tmp_path / "moved", progress=False)
    assert (again.rows.read, again.digest()) == (0, first.digest())
    assert again.path(0).exists()


@pytest.mark.parametrize("refresh", [True, False])
def test_index_of_other_data_is_refused(folder, tmp_path, refresh):
    file = tmp_path / "index.npz"
    open_index(folder, file, progress=False)
    other = tmp_path / "other"
    for number in range(12):
        put(other, f"{'cab'[number % 3]}/{number:02d}.jpg", small(60 + number, 90))
    with pytest.raises(UsageError, match="of other data"):
        open_index(other, file, refresh=refresh, progress=False)


def test_index_of_shards_is_refused_for_a_folder(folder, shards, tmp_path):
    open_index(shards, tmp_path / "index.npz", progress=False)
    with pytest.raises(UsageError, match="of other data"):
        open_index(folder, tmp_path / "index.npz", progress=False)


def test_unwritable_place_keeps_the_index_in_memory_or_says_so(folder, monkeypatch, caplog):
    def refuse(self, path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data_pipeline.index.Index.save", refuse)
    assert len(open_index(folder, progress=False)) == 12
    assert "is not kept" in caplog.text
    with pytest.raises(UsageError, match="cannot write the index"):
        open_index(folder, folder.parent / "i.npz", progress=False)


def test_shards_are_refreshed_one_by_one(shards):
    open_index(shards, progress=False)
    assert open_index(shards, progress=False).rows.read == 0
    write_shard(shards / "0000b.tar", {"x.jpg": small(), "y.jpg": b"bad", "x.cls": b"7"})
    index = open_index(shards, progress=False)
    assert index.rows.read == 1
    assert index.digest() == index_of(shards).digest()
    assert [name for name, _ in index.unreadable] == ["0000b.tar/y.jpg"]


@pytest.mark.parametrize("refresh", [True, False])
def test_a_shard_that_has_shrunk_is_one_clear_error(shards, refresh):
    open_index(shards, progress=False)
    os.truncate(shards / "0001.tar", 3000)
    with pytest.raises(UsageError, match=r"0001\.tar has shrunk: 3,000 bytes"):
        open_index(shards, refresh=refresh, progress=False)


def test_index_and_order_need_neither_torch_nor_dali():
    code = (
        "import sys, data_pipeline.index_build, data_pipeline.plan, data_pipeline.decoder;"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'nvidia')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_progress_is_reported_to_the_end(folder):
    seen = []
    build_index(folder, workers=1, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)


def test_indexing_takes_at_most_a_millisecond_per_image(tmp_path):
    data = small()
    for number in range(3000):
        put(tmp_path, f"{number:05d}.jpg", data)
    start = time.process_time()
    index = index_of(tmp_path)
    assert len(index) == 3000
    assert time.process_time() - start < 3
