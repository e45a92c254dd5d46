"""Annotations beside an index of images: found by name, compared by size; label maps of ADE20K's kind."""

import json

import numpy as np
import pytest
from PIL import Image

from data_pipeline.annotations.coco import read_coco
from data_pipeline.annotations.label_maps import IGNORED, place_labels, read_label_map
from data_pipeline.annotations.matching import label_files, match_objects, refuse_contradictions, with_objects
from data_pipeline.annotations.placing import Placing
from data_pipeline.errors import BadImage, UsageError
from data_pipeline.index_build import build_index

SIZES = {"a.jpg": (40, 30), "deep/b.jpg": (30, 40), "c.jpg": (20, 20), "d.jpg": (20, 20)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name, (height, width) in SIZES.items():
        (root / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (width, height)).save(root / name)
    return root


@pytest.fixture(scope="module")
def index(images):
    return build_index(images, progress=False)


def coco(tmp_path, **sizes):
    """A file of all images but d.jpg, each with an object, that of c.jpg a crowd; of other sizes where given."""
    about = {"categories": [{"id": 1, "name": "x"}], "images": [], "annotations": []}
    for number, name in enumerate(["c.jpg", "deep/b.jpg", "a.jpg", "not_there.jpg"]):
        height, width = sizes.get(name.partition(".")[0], SIZES.get(name, (9, 9)))
        about["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        box = {"bbox": [1, 1, 5, 5], "segmentation": [[1, 1, 6, 1, 6, 6]], "iscrowd": int(name == "c.jpg")}
        about["annotations"].append({"id": number, "image_id": number, "category_id": 1, **box})
    (tmp_path / "instances.json").write_text(json.dumps(about))
    return read_coco(tmp_path / "instances.json")


def test_images_find_their_objects_by_name(index, tmp_path):
    found = coco(tmp_path)
    matched = match_objects(index, found)
    names = [index.name(image) for image in range(len(index))]
    assert {name: int(row) for name, row in zip(names, matched.rows, strict=True)} == {
        "a.jpg": 2,
        "c.jpg": 0,
        "d.jpg": -1,
        "deep/b.jpg": 1,
    }
    assert matched.bad == []
    assert [names[image] for image in with_objects(found, matched.rows)] == ["a.jpg", "deep/b.jpg"]
    assert refuse_contradictions(matched.bad, tmp_path / "instances.json", images=4, limit=0, key="limit") == []


def test_an_image_of_another_size_is_named_and_above_the_limit_refused(index, tmp_path):
    found = coco(tmp_path, a=(30, 40))
    matched = match_objects(index, found)
    assert matched.rows.tolist().count(-1) == 2
    assert [(one.what, one.reason) for one in matched.bad] == [
        ("a.jpg", "the image is 30 x 40 px, its annotations are of 40 x 30 px")
    ]
    about = {"path": tmp_path / "instances.json", "images": 4, "key": "limit"}
    (line,) = refuse_contradictions(matched.bad, limit=0.25, **about)
    assert line.startswith(f"1 annotations of {tmp_path}/instances.json are left out: a.jpg: the image is 30 x 40 px")
    with pytest.raises(
        UsageError,
        match=r"contradicts itself or the images 1 times, allowed are 0 \(limit=0\.1 of 4 images\).*a\.jpg: the image",
    ):
        refuse_contradictions(matched.bad, limit=0.1, **about)


def test_label_maps_are_found_beside_their_images(index, images, tmp_path):
    for name in SIZES:
        path = tmp_path / name.replace("jpg", "png")
        path.parent.mkdir(exist_ok=True)
        path.touch()
    expected = [tmp_path / index.name(image).replace("jpg", "png") for image in range(len(index))]
    assert label_files(index, tmp_path) == expected
    (tmp_path / "c.png").unlink()
    with pytest.raises(UsageError, match=r"1 of 4 images have no label map \(.*c\.png\)"):
        label_files(index, tmp_path)
    with pytest.raises(UsageError, match="is no folder"):
        label_files(index, tmp_path / "none")


def test_a_palettes_numbers_are_read_and_not_its_colours(tmp_path):
    values = np.array([[0, 1, 2], [3, 3, 0]], np.uint8)
    image = Image.fromarray(values)
    image.save(tmp_path / "grey.png")
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.save(tmp_path / "palette.png")
    for name in ("grey.png", "palette.png"):
        labels = read_label_map(tmp_path / name, height=2, width=3, classes=3)
        assert labels.tolist() == [[IGNORED, 0, 1], [2, 2, IGNORED]]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: Image.new("L", (3, 3)).save(path), "is 3 x 3 px, its image 3 x 2 px"),
        (lambda path: Image.new("L", (3, 2), 5).save(path), "has the value 5; expected at most 4"),
        (lambda path: Image.new("RGB", (3, 2)).save(path), "is of mode RGB"),
        (lambda path: path.write_bytes(b"x"), "cannot be read"),
        (lambda path: None, "cannot be read"),
    ],
)
def test_a_label_map_that_cannot_be_is_named(tmp_path, make, said):
    make(tmp_path / "a.png")
    with pytest.raises(BadImage, match=rf"label map a\.png {said}"):
        read_label_map(tmp_path / "a.png", height=2, width=3, classes=4)


def test_labels_are_cut_flipped_and_filled_up_as_the_image():
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    region, filled = np.array([0, 1, 3, 4], np.float32), np.array([6, 3], np.int32)
    placed = place_labels(labels, Placing.of(region, filled, 1), 7)
    assert placed[:6, :3].tolist() == np.repeat(labels[:, 1:][:, ::-1], 2, axis=0).tolist()
    assert (placed[6] == IGNORED).all()
    assert (placed[:, 3:] == IGNORED).all()
