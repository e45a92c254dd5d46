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
from mae_scale.tasks.detection.average_precision import MEASURES, average_precision, results_of

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


def truth_of(annotations) -> COCO:
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
    truth = truth_of(annotations)
    results = detections(truth, seed)
    with contextlib.redirect_stdout(io.StringIO()):
        peer = COCOeval(truth, truth.loadRes([dict(one) for one in results]), kind)
        peer.evaluate()
        peer.accumulate()
        peer.summarize()
    found = average_precision(annotations, results, kind)
    assert tuple(found) == MEASURES
    assert 5 < found["AP"] < 95
    for name, value in zip(MEASURES, peer.stats, strict=True):
        assert math.isnan(found[name]) if value < 0 else found[name] == pytest.approx(100 * value, rel=1e-12), name


def test_exact_detections_are_found_whole_and_nothing_is_nothing(annotations):
    """Of the model's kind: boxes in pixels of twice the size, masks of 28 x 28 within them."""
    truth, results = truth_of(annotations), []
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
    assert average_precision(annotations, results, "bbox")["AP"] == pytest.approx(100)
    assert average_precision(annotations, results, "segm")["AP50"] > 95
    assert average_precision(annotations, [], "bbox")["AP"] == 0


def test_an_image_without_detections_has_no_results():
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
        "masks": torch.zeros(0, 1, 28, 28),
    }
    assert results_of(1, nothing, scale=(0.5, 0.5), size=(SIDE, SIDE), ids=[1]) == []
