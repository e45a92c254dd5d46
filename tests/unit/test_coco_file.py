"""COCO's JSON of objects: what is read is what is given, and each contradiction is named."""

import copy
import json

import numpy as np
import pytest

from data_pipeline.annotations.coco import read_coco
from data_pipeline.errors import UsageError

FILE = {
    "images": [
        {"id": 7, "file_name": "b.jpg", "height": 4, "width": 6},
        {"id": 3, "file_name": "a.jpg", "height": 10, "width": 20},
        {"id": 9, "file_name": "empty.jpg", "height": 5, "width": 5},
    ],
    "categories": [{"id": 90, "name": "dog"}, {"id": 2, "name": "cat"}],
    "annotations": [
        {
            "id": 11,
            "image_id": 3,
            "category_id": 90,
            "bbox": [1, 2, 5.5, 4],
            "segmentation": [[1, 2, 6.5, 2, 6.5, 6], [1, 2, 3, 3, 1, 6, 2, 2]],
            "iscrowd": 0,
        },
        {
            "id": 12,
            "image_id": 7,
            "category_id": 2,
            "bbox": [0, 0, 6, 4],
            "segmentation": {"size": [4, 6], "counts": [3, 5, 16]},
            "iscrowd": 1,
        },
        {"id": 5, "image_id": 3, "category_id": 2, "bbox": [-1, 0, 4, 11], "segmentation": [[0, 0, 3, 0, 3, 10]]},
    ],
}


@pytest.fixture
def read(tmp_path):
    def call(about):
        path = tmp_path / "instances.json"
        path.write_text(about if isinstance(about, str) else json.dumps(about))
        return read_coco(path)

    return call


def test_objects_are_by_image_in_the_order_of_the_file(read):
    found = read(FILE)
    assert (found.names, found.image_ids) == (["b.jpg", "a.jpg", "empty.jpg"], [7, 3, 9])
    assert (found.category_ids, found.categories) == ([2, 90], ["cat", "dog"])
    objects = found.objects
    assert [objects.ids[objects.of(image)].tolist() for image in range(3)] == [[12], [11, 5], []]
    assert objects.category.tolist() == [0, 1, 0]
    assert objects.crowd.tolist() == [True, False, False]
    assert objects.boxes.tolist() == [[0, 0, 6, 4], [1, 2, 6.5, 6], [0, 0, 3, 10]]  # the last is cut at the edges
    assert [polygon.tolist() for polygon in objects.polygons(1)] == [
        [[1, 2], [6.5, 2], [6.5, 6]],
        [[1, 2], [3, 3], [1, 6], [2, 2]],
    ]
    assert objects.polygons(0) == []
    assert objects.run_lengths(0).tolist() == [3, 5, 16]
    assert objects.run_lengths(1).tolist() == []
    assert found.bad == []


@pytest.mark.parametrize("seed", range(5))
def test_compressed_run_lengths_are_those_of_pycocotools(read, seed):
    coco_mask = pytest.importorskip("pycocotools.mask")
    masks = np.random.default_rng(seed).random((4, 23, 31)) < (0.02, 0.5, 0.98, 0)[seed % 4]
    about = {**FILE, "images": [{"id": 0, "file_name": "x", "height": 23, "width": 31}], "annotations": []}
    for number, mask in enumerate(masks):
        compressed = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        given = {"size": [23, 31], "counts": compressed["counts"].decode()}
        box = {"bbox": [0, 0, 31, 23], "segmentation": given}
        about["annotations"].append({"id": number, "image_id": 0, "category_id": 2, **box})
    objects = read(about).objects
    for number, mask in enumerate(masks):
        runs = objects.run_lengths(number)
        values = np.repeat(np.arange(len(runs)) % 2, runs).reshape(31, 23).T
        assert np.array_equal(values, mask)


def changed(**values):
    """The first object with other values; None takes a key away."""
    annotation = {**FILE["annotations"][0], **values}
    return {key: value for key, value in annotation.items() if value is not None}


RUNS = {"size": [10, 20], "counts": [200]}
BAD = {
    "image": (changed(image_id=99), "object 11", "image_id 99 does not exist"),
    "category": (changed(category_id=1), "object 11 of a.jpg", "category_id 1 does not exist"),
    "id of text": (changed(id="x"), "object x of a.jpg", "its id is 'x'; expected a whole number"),
    "image of a list": (changed(image_id=[3]), "object 11", "its image_id is [3]; expected a whole number"),
    "category of nothing": (changed(category_id={}), "object 11 of a.jpg", "its category_id is {}"),
    "no box": (changed(bbox=None), "object 11 of a.jpg", "it has no bbox"),
    "box of three": (changed(bbox=[1, 2, 3]), "object 11 of a.jpg", "its box is [1, 2, 3]"),
    "box not finite": (changed(bbox=[1, 2, 3, float("nan")]), "object 11 of a.jpg", "expected x, y, width, height"),
    "empty box": (changed(bbox=[1, 2, 0, 3]), "object 11 of a.jpg", "its box is 0 x 3 px"),
    "box outside": (changed(bbox=[1, 2, 30, 3]), "object 11 of a.jpg", "reaches 11 px out of the image of 20 x 10 px"),
    "two points": (changed(segmentation=[[1, 2, 3, 4]]), "object 11 of a.jpg", "a polygon has 4 coordinates"),
    "odd": (changed(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "object 11 of a.jpg", "a polygon has 7 coordinates"),
    "text": (changed(segmentation=[["a"]]), "object 11 of a.jpg", "a polygon is no list of numbers"),
    "no mask": (changed(segmentation=[]), "object 11 of a.jpg", "it has no mask"),
    "mask of another size": (
        changed(segmentation={"size": [20, 10], "counts": [200]}),
        "object 11 of a.jpg",
        "its mask is of [20, 10] (height, width) px, its image of [10, 20]",
    ),
    "short runs": (changed(segmentation={**RUNS, "counts": [3, 4]}), "object 11 of a.jpg", "are of 7 px"),
    "negative runs": (changed(segmentation={**RUNS, "counts": [-1, 201]}), "object 11 of a.jpg", "cannot be read"),
    "no runs": (changed(segmentation={"size": [10, 20]}), "object 11 of a.jpg", "cannot be read"),
    "wrong character": (changed(segmentation={**RUNS, "counts": "0 1"}), "object 11 of a.jpg", "hold ' '"),
    "cut off": (changed(segmentation={**RUNS, "counts": "o"}), "object 11 of a.jpg", "are cut off"),
    "not a mapping": ([1], "annotation number 0", "it is a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_contradiction_is_named_and_the_others_stay(read, case):
    annotation, what, reason = BAD[case]
    found = read({**FILE, "annotations": [annotation, *FILE["annotations"][1:]]})
    assert len(found.bad) == 1
    assert found.bad[0].what == what
    assert reason in found.bad[0].reason
    assert found.objects.ids.tolist() == [12, 5]
    assert found.objects.first.tolist() == [0, 1, 2, 2]


def test_an_id_that_another_object_has_is_named(read):
    about = copy.deepcopy(FILE)
    about["annotations"][2]["id"] = 11
    found = read(about)
    assert [(bad.what, bad.reason) for bad in found.bad] == [("object 11 of a.jpg", "its id is another object's too")]


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "COCO's JSON of objects, holds a list, expected an object"),
        ({"images": [], "annotations": []}, "is not COCO's JSON of objects: 'categories'"),
        ({**FILE, "images": [{"id": 1, "height": 2, "width": 2}]}, "is not COCO's JSON of objects: 'file_name'"),
        ({**FILE, "images": [{**FILE["images"][0], "height": float("inf")}]}, "is not COCO's JSON of objects: cannot"),
        ({**FILE, "images": 2 * FILE["images"]}, "gives image id 7 more than once (3 such)"),
        ({**FILE, "categories": 2 * FILE["categories"]}, "gives category id 2 more than once"),
    ],
)
def test_a_file_that_cannot_be_told_apart_is_refused(read, about, said):
    with pytest.raises(UsageError) as refused:
        read(about)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_coco(tmp_path / "none.json")
