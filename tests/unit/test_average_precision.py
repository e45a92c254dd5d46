"""Average precision: pycocotools' numbers, and results that say what was detected."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data_pipeline.scenes import write_scenes
from mae_scale.tasks.detection.average_precision import MEASURES, average_precision, results_of, truth_of

SIDE = 96


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """Scenes, of which one has a crowd."""
    root = write_scenes(tmp_path_factory.mktemp("scenes") / "digits", train=1, val=16, side=SIDE)
    path = root / "val" / "instances.json"
    about = json.loads(path.read_text())
    about["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(about))
    return path


def pycocotools_truth(annotations) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(annotations)


def detections(truth, seed) -> list[dict]:
    """Some of the objects, moved, with random scores and some wrong categories; and some of nothing."""
    random, found = np.random.default_rng(seed), []
    for annotation in truth.anns.values():
        for _ in range(random.integers(0, 3)):
            mask = np.roll(truth.annToMask(annotation), int(random.integers(-3, 4)), axis=1)
            runs = coco_mask.encode(np.asfortranarray(mask))
            category = annotation["category_id"] if random.random() < 0.8 else int(random.integers(1, 11))
            box = np.array(annotation["bbox"]) + random.normal(0, 2, 4)
            found.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": category,
                    "bbox": [*box[:2], *np.maximum(box[2:], 1)],
                    "score": float(random.random()),
                    "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
                }
            )
    return found


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_those_of_pycocotools(annotations, kind, seed):
    truth = pycocotools_truth(annotations)
    results = detections(truth, seed)
    with contextlib.redirect_stdout(io.StringIO()):
        # Of masks without boxes: with them the area that sizes are told by would be the boxes'.
        theirs = [{k: v for k, v in one.items() if k != "bbox" or kind == "bbox"} for one in results]
        peer = COCOeval(truth, truth.loadRes(theirs), kind)
        peer.evaluate()
        peer.accumulate()
        peer.summarize()
    found = average_precision(truth_of(annotations), results, kind)
    assert tuple(found) == MEASURES
    assert 5 < found["AP"] < 95
    for name, value in zip(MEASURES, peer.stats, strict=True):
        assert math.isnan(found[name]) if value < 0 else found[name] == pytest.approx(100 * value, rel=1e-12), name


def test_exact_detections_are_found_whole_and_nothing_is_nothing(annotations):
    """Of the model's kind: boxes in pixels of twice the size, masks of 28 x 28 within them."""
    truth, results = pycocotools_truth(annotations), []
    ids = sorted(truth.cats)
    for image in truth.imgs:
        own = truth.imgToAnns[image]
        boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float32)
        corners = 2 * torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        masks = []
        for a, (x, y, w, h) in zip(own, boxes.int().tolist(), strict=True):
            cut = torch.tensor(truth.annToMask(a)[y : y + h, x : x + w], dtype=torch.float32)
            masks.append(torch.nn.functional.interpolate(cut[None, None], (28, 28), mode="bilinear")[0])
        labels = torch.tensor([ids.index(a["category_id"]) + 1 for a in own])
        found = {"boxes": corners, "labels": labels, "scores": torch.ones(len(own)), "masks": torch.stack(masks)}
        results += results_of(image, found, scale=(0.5, 0.5), size=(SIDE, SIDE), ids=ids)
    assert average_precision(truth_of(annotations), results, "bbox")["AP"] == pytest.approx(100)
    assert average_precision(truth_of(annotations), results, "segm")["AP50"] > 95
    assert average_precision(truth_of(annotations), [], "bbox")["AP"] == 0


def test_an_image_without_detections_has_no_results():
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
        "masks": torch.zeros(0, 1, 28, 28),
    }
    assert results_of(1, nothing, scale=(0.5, 0.5), size=(SIDE, SIDE), ids=[1]) == []


def written(tmp_path, change) -> tuple:
    """Two images with an object each; the path of the JSON once it is changed, and exact detections."""
    objects = [
        {"id": 7 + number, "image_id": number + 1, "category_id": 1, "bbox": [2, 2, 40, 40], "iscrowd": 0}
        | {"segmentation": [[2, 2, 42, 2, 42, 42, 2, 42]], "area": 1600}
        for number in range(2)
    ]
    about = {
        "images": [{"id": number, "file_name": f"{number}.jpg", "height": 64, "width": 64} for number in (1, 2)],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": objects,
    }
    results = [
        {"image_id": one["image_id"], "category_id": 1, "bbox": one["bbox"], "score": 0.9}
        | {"segmentation": coco_mask.frPyObjects(one["segmentation"], 64, 64)[0]}
        for one in objects
    ]
    change(about)
    (tmp_path / "instances.json").write_text(json.dumps(about))
    return tmp_path / "instances.json", results


CHANGES = {
    "nothing": lambda about: None,
    "an object with the id 0": lambda about: about["annotations"][0].update(id=0),
    "iscrowd is null": lambda about: about["annotations"][0].update(iscrowd=None),
    "without areas": lambda about: [one.pop("area") for one in about["annotations"]],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_exact_detections_are_found_whatever_ids_and_areas_are_written(change, kind, tmp_path):
    path, results = written(tmp_path, change)
    found = average_precision(truth_of(path), results, kind)
    assert found["AP"] == pytest.approx(100)
    assert found["APm"] == pytest.approx(100)
    assert math.isnan(found["APl"])


def test_images_that_are_not_measured_and_objects_that_are_left_out_do_not_count(tmp_path):
    path, results = written(tmp_path, lambda about: None)
    assert average_precision(truth_of(path), results[:1], "bbox")["AP"] == pytest.approx(50, abs=1)
    assert average_precision(truth_of(path, images={1}), results[:1], "bbox")["AP"] == pytest.approx(100)
    assert average_precision(truth_of(path, left_out=[1]), results[:1], "bbox")["AP"] == pytest.approx(100)


def test_a_mask_is_small_by_its_own_area(tmp_path):
    """A thin mask in a large box, that is of nothing: it is no false positive among medium objects' masks."""
    path, results = written(tmp_path, lambda about: None)
    thin = coco_mask.frPyObjects([[2, 2, 62, 2, 62, 6, 2, 6]], 64, 64)[0]
    results.append({"image_id": 1, "category_id": 1, "bbox": [2, 2, 60, 60], "score": 0.95, "segmentation": thin})
    assert average_precision(truth_of(path), results, "segm")["APm"] == pytest.approx(100)
    assert average_precision(truth_of(path), results, "bbox")["APm"] < 90
