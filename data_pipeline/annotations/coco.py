"""Read COCO's JSON of objects ("instances"): images, categories, boxes, masks; contradictory ones are named, left out.

Format: Lin et al., "Microsoft COCO" (arXiv 1405.0312), and cocodataset.org. A box is (x, y, width, height); a mask
is a list of polygons (x, y, x, y, ...), or run lengths down the columns, as counts or compressed. Objects with
"iscrowd" stand for many.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.annotations.objects import Objects, rows_of
from data_pipeline.errors import UsageError, reason_of
from data_pipeline.json_object import read_object

OUTSIDE_PX = 2.0
"""How far a box may reach over the image's edge: published files round."""


@dataclass(frozen=True)
class BadObject:
    """An object, or all objects of an image, that cannot be used: where it is and the reason."""

    what: str
    reason: str


@dataclass(frozen=True)
class CocoFile:
    """The images of a file in its order: names as given, ids, sizes int [n]; the categories in the order of their ids,
    which need not be without gaps; the objects, and those that were left out, with their places in "annotations"."""

    names: list[str]
    image_ids: list[int]
    heights: list[int]
    widths: list[int]
    category_ids: list[int]
    categories: list[str]
    objects: Objects
    bad: list[BadObject]
    left_out: list[int]


class _Unusable(Exception):
    """The reason for which one object is left out."""


def read_coco(path: Path) -> CocoFile:
    """Return what a file annotates; objects that contradict it or themselves are in `bad`.

    Raises UsageError for a file that cannot be read, that is no such JSON, or in which an image or a category is given
    twice: nothing could then be told apart.
    """
    about = read_object(path, f"{path}, which is to be COCO's JSON of objects,")
    try:
        images = [(int(i["id"]), str(i["file_name"]), int(i["height"]), int(i["width"])) for i in about["images"]]
        categories = sorted((int(c["id"]), str(c["name"])) for c in about["categories"])
        annotations = list(about["annotations"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{path} is not COCO's JSON of objects: {reason_of(error)}; expected images (id, file_name, height, "
            "width), categories (id, name) and annotations"
        ) from None
    for kind, found in (("image id", [i[0] for i in images]), ("file_name", [i[1] for i in images])):
        _refuse_twice(path, kind, found)
    _refuse_twice(path, "category id", [c[0] for c in categories])
    rows = {image_id: row for row, (image_id, *_) in enumerate(images)}
    classes = {category_id: row for row, (category_id, _) in enumerate(categories)}
    objects, bad, left_out = _objects(annotations, images, rows, classes)
    return CocoFile(
        [name for _, name, _, _ in images],
        [image_id for image_id, *_ in images],
        [height for _, _, height, _ in images],
        [width for *_, width in images],
        [category_id for category_id, _ in categories],
        [name for _, name in categories],
        objects,
        bad,
        left_out,
    )


def _refuse_twice(path: Path, kind: str, found: list[Any]) -> None:
    twice = [value for value, count in Counter(found).items() if count > 1]
    if twice:
        raise UsageError(f"{path} gives {kind} {twice[0]} more than once ({len(twice)} such); expected each once")


@dataclass
class _Object:
    image: int
    id: int
    category: int
    box: tuple[float, float, float, float]
    crowd: bool
    polygons: list[np.ndarray]
    runs: list[int]


def _objects(
    annotations: list[Any], images: list[tuple[int, str, int, int]], rows: dict[int, int], classes: dict[int, int]
) -> tuple[Objects, list[BadObject], list[int]]:
    """Return the usable objects by image, the others, and the others' places in the list."""
    by_image: list[list[_Object]] = [[] for _ in images]
    bad, left_out, seen = [], [], set()
    for number, annotation in enumerate(annotations):
        try:
            found = _object(annotation, images, rows, classes)
            if found.id in seen:
                raise _Unusable("its id is another object's too")
            seen.add(found.id)
            by_image[found.image].append(found)
        except _Unusable as error:
            bad.append(BadObject(_place(annotation, number, images, rows), str(error)))
            left_out.append(number)
    objects = [one for of_image in by_image for one in of_image]
    polygons = [polygon for one in objects for polygon in one.polygons]
    points = np.concatenate([np.zeros((0, 2), np.float32), *polygons])
    return (
        Objects(
            first=rows_of([len(of_image) for of_image in by_image]),
            ids=np.array([one.id for one in objects], np.int64),
            category=np.array([one.category for one in objects], np.int32),
            boxes=np.array([one.box for one in objects], np.float32).reshape(-1, 4),
            crowd=np.array([one.crowd for one in objects], bool),
            polygons_of=rows_of([len(one.polygons) for one in objects]),
            points_of=rows_of([len(polygon) for polygon in polygons]),
            points=points,
            runs_of=rows_of([len(one.runs) for one in objects]),
            runs=np.array([run for one in objects for run in one.runs], np.int32),
        ),
        bad,
        left_out,
    )


def _place(annotation: Any, number: int, images: list[tuple[int, str, int, int]], rows: dict[int, int]) -> str:
    """Return the name of an object for people."""
    if not isinstance(annotation, dict):
        return f"annotation number {number}"
    image = annotation.get("image_id")
    row = rows.get(image) if isinstance(image, int) else None
    name = f"object {annotation.get('id', f'number {number}')}"
    return name if row is None else f"{name} of {images[row][1]}"


def _object(
    annotation: Any, images: list[tuple[int, str, int, int]], rows: dict[int, int], classes: dict[int, int]
) -> _Object:
    if not isinstance(annotation, dict):
        raise _Unusable(f"it is a {type(annotation).__name__}; expected a mapping")
    missing = [key for key in ("id", "image_id", "category_id", "bbox") if key not in annotation]
    if missing:
        raise _Unusable(f"it has no {missing[0]}")
    for key in ("id", "image_id", "category_id"):
        if not isinstance(annotation[key], int):
            raise _Unusable(f"its {key} is {annotation[key]!r}; expected a whole number")
    image, category = rows.get(annotation["image_id"]), classes.get(annotation["category_id"])
    if image is None:
        raise _Unusable(f"image_id {annotation['image_id']} does not exist")
    if category is None:
        raise _Unusable(f"category_id {annotation['category_id']} does not exist")
    _, _, height, width = images[image]
    polygons, runs = _mask(annotation.get("segmentation"), height, width)
    box = _box(annotation["bbox"], height, width)
    crowd = bool(annotation.get("iscrowd", 0))
    return _Object(image, annotation["id"], category, box, crowd, polygons, runs)


def _box(given: Any, height: int, width: int) -> tuple[float, float, float, float]:
    """Return (x0, y0, x1, y1), cut at the image's edges."""
    if not isinstance(given, list) or len(given) != 4 or not all(_is_finite(value) for value in given):
        raise _Unusable(f"its box is {given}; expected x, y, width, height")
    x, y, w, h = map(float, given)
    if w <= 0 or h <= 0:
        raise _Unusable(f"its box is {w:g} x {h:g} px")
    over = max(-x, -y, x + w - width, y + h - height)
    if over > OUTSIDE_PX:
        raise _Unusable(f"its box reaches {over:g} px out of the image of {width} x {height} px")
    return max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)


def _mask(given: Any, height: int, width: int) -> tuple[list[np.ndarray], list[int]]:
    """Return polygons float32 [points, 2], or run lengths."""
    if isinstance(given, dict):
        return [], _run_lengths(given, height, width)
    if not isinstance(given, list) or not given:
        raise _Unusable("it has no mask (segmentation)")
    return [_polygon(one) for one in given], []


def _polygon(given: Any) -> np.ndarray:
    if not isinstance(given, list) or not all(_is_finite(value) for value in given):
        raise _Unusable("a polygon is no list of numbers")
    if len(given) < 6 or len(given) % 2:
        raise _Unusable(f"a polygon has {len(given)} coordinates; expected at least three points, x and y each")
    return np.array(given, np.float32).reshape(-1, 2)


def _run_lengths(given: dict[str, Any], height: int, width: int) -> list[int]:
    counts, size = given.get("counts"), given.get("size")
    if size != [height, width]:
        raise _Unusable(f"its mask is of {size} (height, width) px, its image of [{height}, {width}]")
    if isinstance(counts, str):
        counts = _decompressed(counts)
    if not isinstance(counts, list) or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise _Unusable("the run lengths of its mask (counts) cannot be read")
    if sum(counts) != height * width:
        raise _Unusable(f"the run lengths of its mask are of {sum(counts)} px, its image has {height * width}")
    return counts


def _decompressed(text: str) -> list[int]:
    """Return the run lengths of COCO's compressed text: five bits a character, from the third on by difference."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise _Unusable(f"the run lengths of its mask hold {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise _Unusable("the run lengths of its mask are cut off")
    return counts


def _is_finite(value: Any) -> bool:
    """Return whether a value of the file is a number that is finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
