"""The contents of a data folder: which folders are classes, in which order names are, what is refused."""

import itertools
import os
import tempfile
from pathlib import Path

import pytest

from data_pipeline.errors import UsageError
from data_pipeline.folder_listing import list_folder
from data_pipeline.index_build import open_index
from tests.pictures import index_of, names, put, small, write_shard


def test_class_folders_give_labels_in_the_order_of_their_names(folder):
    put(folder, "b/deeper/x.JPEG", small())
    put(folder, "notes.txt", b"no image")
    put(folder, ".hidden/y.jpg", small())
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
        put(tmp_path, name, small())
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
        put(tmp_path, name, small())
    found = names(index_of(tmp_path))
    assert found == sorted(found, key=os.fsencode)
    assert len(found) == 7


def test_flat_folder_has_no_labels(tmp_path):
    put(tmp_path, "x.jpg", small())
    index = index_of(tmp_path)
    assert (index.label.tolist(), index.classes, index.kind) == ([-1], [], "folder")


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
    write_shard(folder / "x.tar", {"a.jpg": small()})
    with pytest.raises(UsageError, match="both images and tar shards"):
        index_of(folder)


def test_folder_without_permission_is_one_clear_error(folder):
    os.chmod(folder / "b", 0)
    child = os.fork()
    if child == 0:  # root may read everything: be nobody
        code = 9
        try:
            if os.getuid() == 0:
                for above in itertools.takewhile(lambda above: above != Path(tempfile.gettempdir()), folder.parents):
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
