"""The index of a data folder: what it holds, what it refuses, how it is refreshed."""

import io
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.byte_reader import ByteReader
from data_pipeline.errors import BadImage, UsageError
from data_pipeline.folder_listing import list_folder
from data_pipeline.image_header.read import read_header
from data_pipeline.index import INDEX_NAME, DamagedIndex, load_index
from data_pipeline.index_build import build_index, open_index
from data_pipeline.verify_images import verify


def picture(height=40, width=60, kind="JPEG", mode="RGB", **options) -> bytes:
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def put(root: Path, name: str, data: bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def index_of(root: Path, **options):
    return build_index(root, workers=1, progress=False, **options)


def names(index) -> list[str]:
    return [index.name(image) for image in range(len(index))]


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "data"
    for number in range(12):
        put(root, f"{'cab'[number % 3]}/{number:02d}.jpg", picture(30 + number, 50))
    return root


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path) -> Path:
    root = tmp_path / "shards"
    for shard in range(3):
        members = {}
        for number in range(4):
            key = f"part/{'long' * 40 if number == 3 else ''}{shard}{number}"
            members[f"{key}.jpg"] = picture(20 + shard, 30 + number)
            if number != 2:
                members[f"{key}.cls"] = b"%d\n" % number
        write_shard(root / f"{shard:04d}.tar", members)
    return root


def test_class_folders_give_labels_in_the_order_of_their_names(folder):
    put(folder, "b/deeper/x.JPEG", picture())
    put(folder, "notes.txt", b"no image")
    put(folder, ".hidden/y.jpg", picture())
    index = index_of(folder)
    assert index.classes == ["a", "b", "c"]
    assert names(index) == sorted(str(p.relative_to(folder)) for p in folder.rglob("[0-9x]*.[jJ]*"))
    assert [index.classes[label] for label in index.label] == [name[0] for name in names(index)]
    assert [int(h) for h in index.height[:4]] == [31, 34, 37, 40]
    assert [index.path(i).stat().st_size for i in range(len(index))] == index.num_bytes.tolist()


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (["Aves/3100/1.jpg", "Aves/3101/1.jpg", "Fungi/56/1.jpg"], ["Aves/3100", "Aves/3101", "Fungi/56"]),
        (["a/abbey/1.jpg", "a/apse/in/1.jpg", "a/apse/out/1.jpg"], ["a/abbey", "a/apse/in", "a/apse/out"]),
        (
            ["a/abbey/1.jpg", "a/abbey/old/1.jpg", "b/bar/1.jpg", "b/bay/2.jpg"],
            ["a/abbey", "a/abbey", "b/bar", "b/bay"],
        ),
        (["ant/images/1.JPEG", "ant/images/2.JPEG", "bee/images/1.JPEG"], ["ant", "ant", "bee"]),
        (["ant/1.jpg", "bee/old/1.jpg", "bee/z/1.jpg"], ["ant", "bee", "bee"]),
    ],
    ids=["iNaturalist", "Places365", "folders inside a class", "Tiny-ImageNet", "one of two"],
)
def test_classes_below_folders_of_them(files, classes, tmp_path):
    for name in files:
        put(tmp_path, name, picture())
    index = index_of(tmp_path)
    assert names(index) == files
    assert [index.classes[label] for label in index.label] == classes
    assert index.classes == sorted(set(classes))
    assert (f"classes such as {classes[0]}" in index.summary()) == ("/" in classes[0])
    assert open_index(tmp_path, progress=False).digest() == index.digest()  # written
    assert open_index(tmp_path, progress=False).digest() == index.digest()  # read, compared with the folder


def test_images_in_a_folder_each_are_still_read_in_large_chunks(tmp_path):
    for number in range(2500):
        put(tmp_path, f"ant/{number:04d}/1.jpg", b"")
    put(tmp_path, "ant/2.jpg", b"")
    put(tmp_path, "bee/1.jpg", b"")
    listing = list_folder(tmp_path)
    assert [(label, names.count(b"\0") + 1) for label, names in listing.chunks] == [
        (0, 1000),
        (0, 1000),
        (0, 501),
        (1, 1),
    ]
    assert listing.num_images == 2502


def test_names_are_in_byte_order_also_where_folders_and_files_mix(tmp_path):
    for name in ("a/1.jpg", "a-b/1.jpg", "a.jpg", "a/b/1.jpg", "a/b.jpg", "Z.jpg", "é/1.jpg"):
        put(tmp_path, name, picture())
    found = names(index_of(tmp_path))
    assert found == sorted(found, key=os.fsencode)
    assert len(found) == 7


def test_flat_folder_has_no_labels(tmp_path):
    put(tmp_path, "x.jpg", picture())
    index = index_of(tmp_path)
    assert (index.label.tolist(), index.classes, index.kind) == ([-1], [], "folder")


def test_any_number_of_processes_gives_the_same_index(folder):
    one, two = index_of(folder), build_index(folder, workers=2, progress=False)
    assert one.digest() == two.digest()


def test_stored_size_is_indexed_and_exif_orientation_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    put(tmp_path, "turned.jpg", picture(40, 60, exif=exif))
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
    put(tmp_path, "x.jpg", picture(33, 77, **options))
    index = index_of(tmp_path)
    assert (index.height.tolist(), index.width.tolist()) == ([33], [77])


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_cut_anywhere_is_found_and_named(kind):
    data = picture(kind=kind)
    for length in [*range(0, 700), *range(700, len(data), 97), len(data) - 1]:
        with pytest.raises(BadImage):
            read_header(lambda at, n, end=length: data[at : min(at + n, end)], length)
    assert read_header(lambda at, n: data[at : at + n], len(data))[:2] == (40, 60)


def test_padding_behind_the_end_marker_is_accepted():
    data = picture() + bytes(300)
    assert read_header(lambda at, n: data[at : at + n], len(data))[:2] == (40, 60)


def test_unreadable_files_are_left_out_counted_and_named_with_reasons(folder):
    put(folder, "a/empty.jpg", b"")
    put(folder, "b/text.jpg", b"<html>not found</html>")
    put(folder, "c/cut.jpg", picture()[:-400])
    (folder / "a" / "gone.jpg").symlink_to(folder / "nowhere")
    index = index_of(folder)
    assert len(index) == 12
    reasons = dict(index.unreadable)
    assert reasons["a/empty.jpg"] == "empty file"
    assert "neither JPEG nor PNG" in reasons["b/text.jpg"]
    assert "no end marker" in reasons["c/cut.jpg"]
    assert "No such file" in reasons["a/gone.jpg"]
    assert "4 unreadable" in index.summary()


def test_saved_index_is_the_same_again(folder, tmp_path):
    put(folder, "a/empty.jpg", b"")
    index = index_of(folder)
    index.save(tmp_path / "elsewhere" / "index.npz")
    again = load_index(tmp_path / "elsewhere" / "index.npz")
    assert (again.digest(), again.unreadable, again.root) == (index.digest(), index.unreadable, index.root)
    assert os.listdir(tmp_path / "elsewhere") == ["index.npz"]


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_a_damaged_index_file_is_one_clear_error(folder, keep):
    open_index(folder, progress=False)
    file = folder / INDEX_NAME
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DamagedIndex, match="damaged or not an index"):
        load_index(file)


def test_refresh_reads_only_what_changed(folder):
    first = open_index(folder, progress=False)
    assert first.rows.read == 12
    assert open_index(folder, progress=False).rows.read == 0
    put(folder, "a/new.jpg", picture(99, 98))
    put(folder, "b/02.jpg", picture(77, 76))
    put(folder, "c/bad.jpg", b"bad")
    (folder / "a" / "01.jpg").unlink()
    second = open_index(folder, progress=False)
    assert second.rows.read == 3
    assert second.digest() == index_of(folder).digest()
    assert [name for name, _ in second.unreadable] == ["c/bad.jpg"]
    third = open_index(folder, progress=False)
    assert (third.rows.read, third.unreadable, third.digest()) == (0, second.unreadable, second.digest())
    put(folder, "c/bad.jpg", picture())
    assert open_index(folder, progress=False).unreadable == []


def test_without_refresh_the_index_stays_what_it_was(folder):
    first = open_index(folder, progress=False)
    put(folder, "a/new.jpg", picture())
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
        put(other, f"{'cab'[number % 3]}/{number:02d}.jpg", picture(60 + number, 90))
    with pytest.raises(UsageError, match="of other data"):
        open_index(other, file, refresh=refresh, progress=False)


def test_index_of_shards_is_refused_for_a_folder(folder, shards, tmp_path):
    open_index(shards, tmp_path / "index.npz", progress=False)
    with pytest.raises(UsageError, match="of other data"):
        open_index(folder, tmp_path / "index.npz", progress=False)


def test_missing_empty_or_wrong_folder_is_one_clear_error(tmp_path, folder):
    with pytest.raises(UsageError, match="does not exist"):
        open_index(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="not a folder"):
        index_of(folder / "a" / "01.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no image in"):
        index_of(tmp_path / "empty")
    put(tmp_path / "empty", "a.gif", b"GIF")
    with pytest.raises(UsageError, match="1 other file;"):
        index_of(tmp_path / "empty")
    put(tmp_path / "broken", "a.jpg", b"")
    with pytest.raises(UsageError, match=r"no readable image.*a\.jpg: empty file"):
        index_of(tmp_path / "broken")
    write_shard(folder / "x.tar", {"a.jpg": picture()})
    with pytest.raises(UsageError, match="both images and tar shards"):
        index_of(folder)


def test_folder_without_permission_is_one_clear_error(folder):
    os.chmod(folder / "b", 0)
    child = os.fork()
    if child == 0:  # root may read everything: be nobody
        code = 9
        try:
            if os.getuid() == 0:
                for above in folder.parents[:3]:
                    if above != Path("/tmp"):
                        os.chmod(above, 0o755)
                os.setuid(65534)
            index_of(folder)
        except UsageError as error:
            code = 2 if "cannot list" in str(error) and "Permission denied" in str(error) else 8
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    os.chmod(folder / "b", 0o755)
    assert os.waitstatus_to_exitcode(status) == 2


def test_unwritable_place_keeps_the_index_in_memory_or_says_so(folder, monkeypatch, caplog):
    def refuse(self, path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data_pipeline.index.Index.save", refuse)
    assert len(open_index(folder, progress=False)) == 12
    assert "is not kept" in caplog.text
    with pytest.raises(UsageError, match="cannot write the index"):
        open_index(folder, folder.parent / "i.npz", progress=False)


def test_shards_are_read_by_offset_with_their_labels(shards):
    index = index_of(shards)
    assert index.label.tolist() == [0, 1, -1, 3] * 3
    assert (index.kind, index.classes, len(index.shard_names)) == ("shards", ["0", "1", "2", "3"], 3)
    reader = ByteReader(index)
    for image in (7, 0, 11, 3):
        assert reader.read(image).tobytes() == picture(20 + image // 4, 30 + image % 4)
    assert index.name(5) == "0001.tar/part/11.jpg"


def test_shards_are_refreshed_one_by_one(shards):
    open_index(shards, progress=False)
    assert open_index(shards, progress=False).rows.read == 0
    write_shard(shards / "0000b.tar", {"x.jpg": picture(), "y.jpg": b"bad", "x.cls": b"7"})
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


def test_verify_names_what_changed_and_deep_decodes_every_image(folder):
    index = index_of(folder)
    assert verify(index, progress=False) == verify(index, deep=True, progress=False) == []
    data = bytearray((folder / "a/01.jpg").read_bytes())
    scan = data.index(b"\xff\xc4")  # a Huffman table: the header walk steps over it
    data[scan + 5 : scan + 21] = b"\xff" * 16
    (folder / "a/01.jpg").write_bytes(data)
    (folder / "b/02.jpg").write_bytes((folder / "b/02.jpg").read_bytes()[:-100])
    (folder / "c/00.jpg").unlink()
    assert [name for name, _ in verify(index, progress=False)] == ["b/02.jpg", "c/00.jpg"]
    found = dict(verify(index, deep=True, progress=False))
    assert list(found) == ["a/01.jpg", "b/02.jpg", "c/00.jpg"]
    assert "cannot be decoded" in found["a/01.jpg"]


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


def test_indexing_takes_at_most_a_millisecond_an_image(tmp_path):
    data = picture()
    for number in range(3000):
        put(tmp_path, f"{number:05d}.jpg", data)
    start = time.process_time()
    index = index_of(tmp_path)
    assert len(index) == 3000
    assert time.process_time() - start < 3


def test_few_labels_are_so_many_of_each_class_by_the_seed_in_the_order_of_the_index(digits):
    index = build_index(digits / "train", progress=False)
    few = index.few(10, seed=0)
    assert np.array_equal(np.bincount(few.label), np.full(10, 10))
    names = [few.name(i) for i in range(len(few))]
    assert names == sorted(names)
    assert names == [few2.name(i) for few2 in [index.few(10, seed=0)] for i in range(100)]
    other = index.few(10, seed=1)
    assert names != [other.name(i) for i in range(100)]
    sizes = {index.name(i): int(index.num_bytes[i]) for i in range(len(index))}
    assert all(sizes[name] == few.num_bytes[i] for i, name in enumerate(names))
    with pytest.raises(UsageError, match="choose at most that many"):
        index.few(1000, seed=0)
