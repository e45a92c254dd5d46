"""COCO's average precision of boxes and masks, and its format of results.

The numbers are pycocotools' (to 1e-12: `tests/unit/test_average_precision.py`), by faster-coco-eval.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Sequence
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
    annotations: Path, results: list[dict[str, Any]], kind: Literal["bbox", "segm"], *, left_out: Sequence[int] = ()
) -> dict[str, float]:
    """Return MEASURES in percent of results on all images of COCO's JSON; NaN where there is nothing to measure.

    left_out: the places in its "annotations" of those that do not count.
    """
    if not results:
        return dict.fromkeys(MEASURES, 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        truth = COCO(_truth(annotations, left_out))
        evaluation = COCOeval_faster(truth, truth.loadRes([dict(one) for one in results]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    found = [float(value) for value in evaluation.stats[: len(MEASURES)]]
    return {name: math.nan if value < 0 else 100 * value for name, value in zip(MEASURES, found, strict=True)}


def _truth(annotations: Path, left_out: Sequence[int]) -> dict[str, Any]:
    """Return COCO's JSON without the annotations that do not count; those without an area get their mask's."""
    about = read_object(annotations, f"{annotations}, which is to be COCO's JSON of objects,")
    sizes = {image["id"]: (image["height"], image["width"]) for image in about["images"]}
    dropped = set(left_out)
    counted = [one for number, one in enumerate(about["annotations"]) if number not in dropped]
    for one in counted:
        one.setdefault("iscrowd", 0)
        if "area" not in one:
            mask = one["segmentation"]
            if isinstance(mask, list) or isinstance(mask["counts"], list):
                mask = coco_mask.frPyObjects(mask, *sizes[one["image_id"]])
            one["area"] = float(coco_mask.area(coco_mask.merge(mask) if isinstance(mask, list) else mask))
    return {**about, "annotations": counted}
