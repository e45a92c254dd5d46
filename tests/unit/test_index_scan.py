"""Files and shards become rows: sizes, labels and offsets; damaged ones are named with their reasons."""

import os

import pytest
from PIL import Image

from data_pipeline.byte_reader import ByteReader
from tests.pictures import index_of, names, put, small


def test_stored_size_is_indexed_and_exif_orientation_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path, "turned.jpg", small(40, 60, exif=exif))
    index = index_of(tmp_path)
    assert (index.height[0], index.width[0]) == (40, 60)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "L"},
        {"mode": "CMYK"},
        {"progressive": True},
        {"kind": "PNG"},
        {"kind": "PNG", "mode": "P"},
        {"icc_profile": b"p" * 200_000},
        {"comment": b"c" * 4090},
        {"restart_marker_blocks": 1},
    ],
    ids=str,
)
def test_every_kind_of_jpeg_and_png_is_measured_whatever_its_suffix(tmp_path, options):
    put(tmp_path, "x.jpg", small(33, 77, **options))
    index = index_of(tmp_path)
    assert (index.height.tolist(), index.width.tolist()) == ([33], [77])


def test_unreadable_files_are_left_out_counted_and_named_with_reasons(folder):
    put(folder, "a/empty.jpg", b"")
    put(folder, "b/text.jpg", b"<html>not found</html>")
    put(folder, "c/cut.jpg", small()[:-400])
    (folder / "a" / "gone.jpg").symlink_to(folder / "nowhere")
    index = index_of(folder)
    assert len(index) == 12
    reasons = dict(index.unreadable)
    assert reasons["a/empty.jpg"] == "empty file"
    assert "neither JPEG nor PNG" in reasons["b/text.jpg"]
    assert "no end marker" in reasons["c/cut.jpg"]
    assert "No such file" in reasons["a/gone.jpg"]
    assert "4 unreadable" in index.summary()


def test_shards_are_read_by_offset_with_their_labels(shards):
    index = index_of(shards)
    assert index.label.tolist() == [0, 1, -1, 3] * 3
    assert (index.kind, index.classes, len(index.shard_names)) == ("shards", ["0", "1", "2", "3"], 3)
    reader = ByteReader(index)
    for image in (7, 0, 11, 3):
        assert reader.read(image).tobytes() == small(20 + image // 4, 30 + image % 4)
    assert index.name(5) == "0001.tar/part/11.jpg"


def test_damaged_shards_give_what_can_be_read_and_name_the_rest(shards):
    os.truncate(shards / "0000.tar", 3000)
    damaged = bytearray((shards / "0001.tar").read_bytes())
    at = damaged.index(b"part/12.jpg")
    damaged[at : at + 100] = b"\xff" * 100
    (shards / "0001.tar").write_bytes(damaged)
    (shards / "0002.tar").write_bytes(b"")
    index = index_of(shards)
    assert {name.split("/")[0] for name in names(index)} == {"0000.tar", "0001.tar"}
    assert {name.split("/")[0] for name, _ in index.unreadable} == {"0000.tar", "0001.tar", "0002.tar"}
    assert all("shard" in reason for _, reason in index.unreadable)
