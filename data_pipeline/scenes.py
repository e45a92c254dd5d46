"""Write scenes for dense tasks: scikit-learn's real digits pasted on crops of its photographs, with exact annotations.

Each scene has one or two digits, scaled, turned, coloured and partly over each other. What is annotated follows from
the pixels that are painted: a digit's mask are those of its own that no later one covers, its box is the mask's.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.annotations.masks import boxes_of, run_lengths
from data_pipeline.arrays import BoolArray, Float32Array, Float64Array, Int64Array, Uint8Array
from data_pipeline.files import write_atomically
from data_pipeline.rng import generator
from data_pipeline.samples import begin_sample, finish_sample, held_out_digits

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_DIGITS = 2
ATTEMPTS = 4  # to find a place for a digit
VISIBLE = 0.75  # share of each digit's pixels that stay visible, at least
GREY = 127.5
FADED = 0.5  # contrast of photographs around grey, on which digits are light or dark
TINT = 60  # of a digit's red, green and blue, from white or black on, at most
SIZES = (0.5, 0.7)  # of a digit's square, in sides of the scene
TURN = 12  # degrees to either side
EDGE = 0.4  # opacity from which on a pixel is the digit's
BACKGROUND = 11  # in label maps; 1 to 10 are the digits, and 0, which means "not labelled", does not occur
CLASSES = [*(str(digit) for digit in range(10)), "background"]
PALETTE = [
    *((0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180)),
    *((70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212), (64, 64, 64)),
]


@dataclass(frozen=True)
class Scene:
    """An image uint8 [S, S, 3], and of each of its n digits: its number in scikit-learn's set, its class, and its
    visible pixels, bool [n, S, S]."""

    image: Uint8Array
    numbers: list[int]
    classes: list[int]
    masks: BoolArray

    def label_map(self) -> Uint8Array:
        """Return the class of each pixel plus 1, uint8 [S, S], BACKGROUND where there is no digit."""
        labels = np.full(self.image.shape[:2], BACKGROUND, np.uint8)
        for kind, mask in zip(self.classes, self.masks, strict=True):
            labels[mask] = kind + 1
        return labels


def write_scenes(root: str | os.PathLike[str], *, train: int, val: int, side: int) -> Path:
    """Write scenes of `side` px: root/train and root/val with images/NUMBER.jpg, labels/NUMBER.png (label maps with a
    palette) and instances.json (COCO's); root/classes.txt with the names of the label maps' classes.

    Digits of validation are not among those of training. The bytes are the same each time; a folder that holds them
    already is left unchanged. Raises UsageError when `root` holds something else.
    """
    root, content = Path(root), {"train": train, "val": val, "side": side}
    if not begin_sample(root, content):
        return root
    from PIL import Image
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    held_out = held_out_digits(digits.target)
    for part, count, numbers in (("train", train, ~held_out), ("val", val, held_out)):
        for folder in ("images", "labels"):
            (root / part / folder).mkdir(parents=True, exist_ok=True)
        scenes = []
        for number in range(count):
            random = generator(0, f"scenes/{part}", number)
            scene = paint(photos, digits.images, digits.target, np.flatnonzero(numbers), side, random)
            Image.fromarray(scene.image).save(root / part / "images" / f"{number:06d}.jpg", quality=95)
            labels = Image.fromarray(scene.label_map())
            labels.putpalette([value for colour in PALETTE for value in colour])
            labels.save(root / part / "labels" / f"{number:06d}.png")
            scenes.append(scene)
        write_atomically(root / part / "instances.json", json.dumps(as_coco(scenes, side)).encode())
    write_atomically(root / "classes.txt", "".join(f"{name}\n" for name in CLASSES).encode())
    finish_sample(root, content)
    return root


def paint(
    photos: list[Image],
    digits: Float64Array,
    classes: Int64Array,
    numbers: Int64Array,
    side: int,
    random: np.random.Generator,
) -> Scene:
    """Return a scene of digits float [n, 8, 8] (0 to 16), of which `numbers` may be taken."""
    canvas = _background(photos, side, random)
    owner = np.full((side, side), -1)
    taken: list[int] = []
    painted: list[int] = []  # pixels of each digit, also those that are covered
    for _ in range(1 + int(random.random() * MOST_DIGITS)):
        number = int(numbers[int(random.random() * len(numbers))])
        for _ in range(ATTEMPTS):
            opacity = _placed(digits[number], side, random)
            mask = opacity >= EDGE
            covered = np.bincount(owner[mask & (owner >= 0)], minlength=len(taken))
            visible = np.bincount(owner[owner >= 0], minlength=len(taken)) - covered
            if mask.any() and np.all(visible >= VISIBLE * np.array(painted)):
                canvas = _coloured(canvas, opacity, random)
                owner[mask] = len(taken)
                taken.append(number)
                painted.append(int(mask.sum()))
                break
    masks = owner == np.arange(len(taken))[:, None, None]
    image = np.rint(np.clip(canvas, 0, 255)).astype(np.uint8)
    return Scene(image, taken, [int(classes[number]) for number in taken], masks)


def _background(photos: list[Image], side: int, random: np.random.Generator) -> Float32Array:
    """Return a square crop of a photograph, faded towards grey: float32 [side, side, 3], 64 to 191."""
    from PIL import Image

    photo = photos[int(random.random() * len(photos))]
    width = int(min(photo.size) * (0.1 + 0.2 * random.random()))
    x, y = (int((length - width) * random.random()) for length in photo.size)
    crop = photo.resize((side, side), Image.Resampling.BICUBIC, box=(x, y, x + width, y + width))
    return GREY + FADED * (np.asarray(crop, np.float32) - GREY)


def _placed(digit: Float64Array, side: int, random: np.random.Generator) -> Float32Array:
    """Return a digit's opacity, float32 [side, side], 0 to 1: scaled, turned, and wholly within the scene."""
    from PIL import Image

    smallest, largest = SIZES
    size = int(side * (smallest + (largest - smallest) * random.random()))
    small = Image.fromarray((digit / 16).astype(np.float32))
    large = small.resize((size, size), Image.Resampling.BICUBIC)
    turned = large.rotate(TURN * (2 * random.random() - 1), Image.Resampling.BICUBIC, expand=True)
    opacity = np.zeros((side, side), np.float32)
    y, x = (int((side - length) * random.random()) for length in (turned.height, turned.width))
    opacity[y : y + turned.height, x : x + turned.width] = np.clip(np.asarray(turned), 0, 1)
    return opacity


def _coloured(canvas: Float32Array, opacity: Float32Array, random: np.random.Generator) -> Float32Array:
    """Return the canvas with a digit in a light or a dark colour, one as likely as the other."""
    is_light = random.random() < 0.5
    colour = TINT * random.random(3) + (255 - TINT if is_light else 0)
    weight = np.clip((opacity - EDGE / 2) / EDGE, 0, 1)[..., None]
    return (canvas * (1 - weight) + colour * weight).astype(np.float32)


def as_coco(scenes: list[Scene], side: int) -> dict[str, Any]:
    """Return COCO's JSON of scenes, named 000000.jpg and on; masks are run lengths."""
    annotations: list[dict[str, Any]] = []
    for image, scene in enumerate(scenes):
        boxes = boxes_of(scene.masks).astype(int).tolist()
        for number, kind, mask, (x0, y0, x1, y1) in zip(scene.numbers, scene.classes, scene.masks, boxes, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": kind + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "segmentation": {"size": [side, side], "counts": run_lengths(mask)},
                    "iscrowd": 0,
                    "digit": number,
                }
            )
    return {
        "images": [
            {"id": number, "file_name": f"{number:06d}.jpg", "height": side, "width": side}
            for number in range(len(scenes))
        ],
        "categories": [{"id": kind + 1, "name": str(kind)} for kind in range(10)],
        "annotations": annotations,
    }
