"""The figure of a detector's predictions over some of the images that it is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from data_pipeline.annotations.coco import read_coco
from data_pipeline.annotations.placing import Placing
from mae_scale.reports.dense import DrawnObject, objects_figure
from mae_scale.tasks.detection.evaluation_set import DetectionSet
from mae_scale.tasks.stored_pictures import shown_rows, stored_pictures

SCORE = 0.5
"""Score from which on a detection is drawn."""


def draw_detections(one: DetectionSet, results: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG of some images with their annotated objects, and below with those found; `results` in COCO's form."""
    found, names = read_coco(one.annotations), one.categories
    pictures = stored_pictures(one.index, shown_rows(one.index))
    by_image: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        if result["score"] >= SCORE:
            by_image.setdefault(result["image_id"], []).append(result)
    annotated, predicted = [], []
    for row, picture in pictures.items():
        height, width = picture.shape[:2]
        whole = Placing(np.ones(2), np.zeros(2), (height, width), flip=False)
        image = found.image_ids.index(one.image_ids[row])
        of_image = found.objects.of(image)
        annotated.append(
            [
                DrawnObject(
                    tuple(found.objects.boxes[number].tolist()),
                    whole.mask(found.objects, number, height, width).astype(bool),
                    int(found.objects.category[number]),
                    names[int(found.objects.category[number])],
                )
                for number in range(of_image.start, of_image.stop)
            ]
        )
        predicted.append([_drawn(result, one.category_ids, names) for result in by_image.get(one.image_ids[row], [])])
    title = f"detected, with a score of {SCORE:g} and above"
    objects_figure(list(pictures.values()), [("annotated", annotated), (title, predicted)], path)


def _drawn(result: dict[str, Any], category_ids: list[int], names: list[str]) -> DrawnObject:
    x, y, width, height = result["bbox"]
    kind = category_ids.index(result["category_id"])
    mask = np.asarray(coco_mask.decode(result["segmentation"])).astype(bool)
    return DrawnObject((x, y, x + width, y + height), mask, kind, f"{names[kind]} {result['score']:.2f}")
