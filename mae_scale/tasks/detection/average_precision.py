"""COCO's average precision of boxes and masks, and its format of results.

The numbers are pycocotools' (to 1e-12: `tests/unit/test_average_precision.py`), by faster-coco-eval.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from data_pipeline.json_object import read_object

MEASURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve, in its order: over IoU 0.5 to 0.95, at 0.5, at 0.75, of small, medium and large objects; recall with
1, 10 and 100 detections an image, and by size."""
FOREGROUND = 0.5
"""Probability from which on a pixel is the object's."""


def results_of(
    image_id: int, detections: dict[str, Tensor], *, scale: Sequence[float], size: tuple[int, int], ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the detections of an image in COCO's format of results: boxes (x, y, width, height), masks as run lengths.

    `detections` as MaskRcnn.detect gives them, in pixels of what it saw; `scale` (y, x) takes these to those of the
    stored image of `size` (height, width); `ids` are the categories' ids, by label from 1 on.
    """
    y, x = scale
    boxes = detections["boxes"].cpu() * detections["boxes"].new_tensor([x, y, x, y]).cpu()
    pasted = paste_masks_in_image(detections["masks"].cpu(), boxes, size)[:, 0] >= FOREGROUND
    found = []
    for box, label, score, mask in zip(
        boxes.tolist(), detections["labels"].tolist(), detections["scores"].tolist(), pasted.numpy(), strict=True
    ):
        runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        found.append(
            {
                "image_id": image_id,
                "category_id": ids[label - 1],
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "score": score,
                "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
            }
        )
    return found


def average_precision(
    truth: dict[str, Any], results: Sequence[dict[str, Any]], kind: Literal["bbox", "segm"]
) -> dict[str, float]:
    """Return MEASURES in percent of results on the images of what `truth_of` gives; NaN where there is no object.

    Small, medium and large masks are told by their own area, and not by their boxes', as detectron2 does.
    """
    found = [{key: value for key, value in one.items() if key != "bbox" or kind == "bbox"} for one in results]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        objects = COCO(truth)
        evaluation = COCOeval_faster(objects, objects.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = [float(value) for value in evaluation.stats[: len(MEASURES)]]
    return {name: math.nan if value < 0 else 100 * value for name, value in zip(MEASURES, stats, strict=True)}


def truth_of(
    annotations: Path, *, images: Collection[int] | None = None, left_out: Sequence[int] = ()
) -> dict[str, Any]:
    """Return COCO's JSON of images, all by default, without the annotations at the places `left_out`.

    They are numbered from 1 on: an id of 0 would say that a detection has found nothing. Those without an area get
    their mask's.
    """
    about = read_object(annotations, f"{annotations}, which is to be COCO's JSON of objects,")
    kept = {int(one["id"]): one for one in about["images"] if images is None or int(one["id"]) in images}
    dropped, counted = set(left_out), list[dict[str, Any]]()
    for place, one in enumerate(about["annotations"]):
        if place not in dropped and one["image_id"] in kept:
            size = tuple(int(kept[one["image_id"]][key]) for key in ("height", "width"))
            crowd = int(bool(one.get("iscrowd")))
            area = one["area"] if "area" in one else _area(one["segmentation"], size)
            counted.append({**one, "id": len(counted) + 1, "iscrowd": crowd, "area": float(area)})
    return {
        "images": [
            {"id": image_id, "height": int(one["height"]), "width": int(one["width"])} for image_id, one in kept.items()
        ],
        "categories": [{**one, "id": int(one["id"])} for one in about["categories"]],
        "annotations": counted,
    }


def _area(mask: Any, size: tuple[int, ...]) -> float:
    """Return the area of a mask as COCO's JSON has it, of an image of `size` (height, width)."""
    if isinstance(mask, list) or isinstance(mask["counts"], list):
        mask = coco_mask.frPyObjects(mask, *size)
    return float(coco_mask.area(coco_mask.merge(mask) if isinstance(mask, list) else mask))
