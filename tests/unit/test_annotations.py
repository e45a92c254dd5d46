"""Annotations beside an index of images: found by name, compared by size; label maps of ADE20K's kind."""

import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from data_pipeline.annotations import annotated
from data_pipeline.annotations.annotated import AnnotatedImages, DamagedAnnotations, load_annotated
from data_pipeline.annotations.coco import read_coco
from data_pipeline.annotations.label_maps import IGNORED, place_labels, read_class_names, read_label_map
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


def test_label_maps_behind_a_linked_folder_are_found(index, tmp_path):
    for name in SIZES:
        path = tmp_path / "maps" / name.replace("jpg", "png").replace("deep", "elsewhere")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    (tmp_path / "maps" / "elsewhere").rename(tmp_path / "elsewhere")
    (tmp_path / "maps" / "deep").symlink_to(tmp_path / "elsewhere")
    assert len(label_files(index, tmp_path / "maps")) == len(SIZES)


def test_two_images_of_one_name_in_shards_are_refused(images, tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number:06d}.tar", "w") as shard:
            shard.add(images / "deep" / "b.jpg", "b.jpg")
    about = {"categories": [{"id": 1, "name": "x"}], "annotations": []}
    about["images"] = [{"id": 0, "file_name": "b.jpg", "height": 30, "width": 40}]
    (tmp_path / "instances.json").write_text(json.dumps(about))
    index = build_index(tmp_path, progress=False)
    assert len(index) == 2
    with pytest.raises(UsageError, match=r"holds more than one image b\.jpg; expected each name once"):
        match_objects(index, read_coco(tmp_path / "instances.json"))


def test_annotations_kept_are_those_of_their_images_and_of_no_others(index, tmp_path):
    """Polygons, run lengths, and images without any, saved and read."""
    about = {"categories": [{"id": 7, "name": "x"}, {"id": 9, "name": "y"}], "images": [], "annotations": []}
    for image, name in enumerate(["deep/b.jpg", "c.jpg", "a.jpg"]):
        height, width = SIZES[name]
        about["images"].append({"id": 10 + image, "file_name": name, "height": height, "width": width})
        for number in range(image + 1):
            x, y = 2 + number, 3 + image
            mask = [[x, y, x + 6, y, x + 6, y + 5], [x, y, x + 2, y, x + 2, y + 7]]
            if number == 1:
                mask = {"size": [height, width], "counts": [y, 5, height * width - y - 5]}
            about["annotations"].append(
                {
                    "id": 100 * image + number,
                    "image_id": 10 + image,
                    "category_id": (7, 9)[number % 2],
                    "bbox": [x, y, 6, 7],
                    "segmentation": mask,
                    "iscrowd": 0,
                }
            )
    (tmp_path / "instances.json").write_text(json.dumps(about))
    coco_file = read_coco(tmp_path / "instances.json")
    kept = AnnotatedImages.of(coco_file, match_objects(index, coco_file).rows, "instances.json")
    kept.save(tmp_path / "objects.npz")
    read = load_annotated(tmp_path / "objects.npz")
    assert read.digest() == kept.digest()
    for image in range(len(index)):
        name = index.name(image)
        expected = [one for one in about["images"] if one["file_name"] == name]
        own = [one for one in about["annotations"] if expected and one["image_id"] == expected[0]["id"]]
        rows = range(read.objects.first[image], read.objects.first[image + 1])
        assert [int(read.objects.ids[row]) for row in rows] == [one["id"] for one in own]
        assert int(read.image_ids[image]) == (expected[0]["id"] if expected else -1)
        for row, one in zip(rows, own, strict=True):
            mask = one["segmentation"]
            polygons = [polygon.ravel().tolist() for polygon in read.objects.polygons(row)]
            assert polygons == (mask if isinstance(mask, list) else [])
            assert read.objects.run_lengths(row).tolist() == (mask["counts"] if isinstance(mask, dict) else [])


def test_annotations_of_another_format_are_refused(index, tmp_path, monkeypatch):
    found = coco(tmp_path)
    kept = AnnotatedImages.of(found, match_objects(index, found).rows, "instances.json")
    with monkeypatch.context() as later:
        later.setattr(annotated, "FORMAT", annotated.FORMAT + 1)
        kept.save(tmp_path / "objects.npz")
    with pytest.raises(DamagedAnnotations, match="is of another format of annotations; remove it"):
        load_annotated(tmp_path / "objects.npz")


@pytest.mark.parametrize(
    "text",
    [
        "wall\n\nbuilding, edifice  \n",
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t11664\t1172\twall\n2\t0.1\t6046\t612\tbuilding, edifice\n",
    ],
)
def test_names_of_classes_are_lines_or_ade20ks_table(tmp_path, text):
    (tmp_path / "names.txt").write_text(text)
    assert read_class_names(tmp_path / "names.txt") == ["wall", "building, edifice"]


@pytest.mark.parametrize("count", [0, 255])
def test_too_few_and_too_many_classes_are_refused(tmp_path, count):
    (tmp_path / "names.txt").write_text("".join(f"{number}\n" for number in range(count)))
    with pytest.raises(UsageError, match=rf"names {count} classes; expected 1 to 254, one on each line"):
        read_class_names(tmp_path / "names.txt")


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


def test_a_label_map_with_a_damaged_part_is_named(tmp_path):
    """Pillow calls this a SyntaxError."""
    Image.fromarray(np.random.default_rng(0).integers(0, 4, (600, 600)).astype(np.uint8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    last = content.rindex(b"IDAT")
    assert last > content.index(b"IDAT")
    content[last : last + 4] = b"\x01\x02\x03\x04"
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadImage, match=r"label map a\.png cannot be read \(.*broken PNG file"):
        read_label_map(tmp_path / "a.png", height=600, width=600, classes=4)


def test_labels_are_cut_flipped_and_filled_up_as_the_image():
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    region, filled = np.array([0, 1, 3, 4], np.float32), np.array([6, 3], np.int32)
    placed = place_labels(labels, Placing.of(region, filled, 1), 7)
    assert placed[:6, :3].tolist() == np.repeat(labels[:, 1:][:, ::-1], 2, axis=0).tolist()
    assert (placed[6] == IGNORED).all()
    assert (placed[:, 3:] == IGNORED).all()
