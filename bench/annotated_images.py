"""Ways of loading annotated images, for bench/dense.py: ours, and torchvision's dataset with its transforms v2."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.utils.data import Dataset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms.v2 import functional as v2

from data_pipeline.annotations.coco import read_coco
from data_pipeline.annotations.placing import PlacedObjects, Placing, place
from data_pipeline.augment.kinds import augmentation
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import TrainingOrder
from data_pipeline.dali_graph import Decoding
from data_pipeline.index import Index
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from data_pipeline.plan import BatchPlan, plan_batch
from data_pipeline.scenes import write_scenes

KIND = "large_scale_jitter"
BATCH = 8  # images that the loaders put together
CORNERS = 16  # rows of pixels between corners of a polygon, at least; COCO's have some thirty corners


class Scenes:
    """Scenes on disk with their objects; `masks` are polygons, as COCO has them, or run lengths."""

    def __init__(self, root: Path, images: int, side: int, masks: str):
        write_scenes(root, train=images, val=1, side=side)
        self.folder, self.json, self.side = root / "train" / "images", root / "train" / "instances.json", side
        if masks == "polygons":
            content = json.loads(self.json.read_text())
            self.json = self.json.with_name("polygons.json")
            self.json.write_text(json.dumps(with_polygons(content)))
        self.index: Index = build_index(self.folder, progress=False)
        self.objects = read_coco(self.json).objects

    def loader(self, image_size: int, batch: int, device: str = "cpu", annotated: bool = True) -> ImageLoader:
        """Return a loader of one epoch."""
        order = TrainingOrder(batch_layout(batch), stop_step=len(self.index) // batch)

        def annotate(plan: BatchPlan) -> PlacedObjects:
            placing = Placing.of(plan.regions[0], plan.filled[0], plan.flips[0])
            image = int(plan.sample_ids[0])
            return place(self.objects, image, placing, height=self.side, width=self.side, image_size=image_size)

        decoding = Decoding(augmentation(KIND), image_size, device=device, threads=1)
        return ImageLoader(self.index, order, decoding, annotate=annotate if annotated else None)


def with_polygons(content: dict) -> dict:
    """Return COCO's JSON with each mask of run lengths as the polygon around its rows."""
    for annotation in content["annotations"]:
        runs = np.array(annotation["segmentation"]["counts"])
        height, width = annotation["segmentation"]["size"]
        mask = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
        rows = np.flatnonzero(mask.any(axis=1))
        rows = np.unique([*rows[:: max(1, min(CORNERS, len(rows) // 8))], rows[-1]])
        left, right = mask[rows].argmax(axis=1), width - mask[rows, ::-1].argmax(axis=1)
        down, up = np.stack([left, rows], axis=1), np.stack([right, rows + 1], axis=1)[::-1]
        annotation["segmentation"] = [np.concatenate([down, up]).ravel().tolist()]
    return content


class TensorImages(CocoDetection):
    """torchvision's dataset with images decoded by torchvision.io."""

    def _load_image(self, id: int) -> torch.Tensor:
        name = self.coco.loadImgs(id)[0]["file_name"]
        data = torchvision.io.read_file(str(Path(self.root) / name))
        return torchvision.tv_tensors.Image(torchvision.io.decode_jpeg(data, mode=torchvision.io.ImageReadMode.RGB))


def ours(scenes: Scenes, size: int, device: str = "cpu", annotated: bool = True) -> Callable[[], int]:
    """Return a round: one epoch through a loader that is kept."""
    loader = scenes.loader(size, BATCH, device, annotated)
    return lambda: sum(len(batch.images) for batch in loader)


def dataset_of(scenes: Scenes, kind: type[CocoDetection]) -> Dataset:
    """Return torchvision's dataset of the scenes, with boxes and masks as its transforms take them."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools says what it does
        plain = kind(scenes.folder, scenes.json)
    return wrap_dataset_for_transforms_v2(plain, target_keys=("boxes", "labels", "masks"))


def torchvisions(scenes: Scenes, size: int, kind: type[CocoDetection]) -> Callable[[], int]:
    """Return a round of torchvision's dataset and transforms, over the crops that ours takes."""
    dataset = dataset_of(scenes, kind)
    batches = len(scenes.index) // BATCH
    plans = [
        plan_batch(scenes.index, augmentation(KIND), seed=0, number=number, global_batch=BATCH, image_size=size)
        for number in range(batches)
    ]

    def run() -> int:
        count = 0
        for plan in plans:
            images, _ = zip(*(moved(dataset, plan, row, size) for row in range(BATCH)), strict=True)
            count += len(torch.stack(images))
        return count

    return run


def moved(dataset: Dataset, plan: BatchPlan, row: int, size: int) -> tuple[torch.Tensor, dict]:
    """Return the image and the objects of a row of a plan, resized, cut, mirrored and filled up by torchvision."""
    image, target = dataset[int(plan.sample_ids[row])]
    stored, filled = np.array(v2.get_size(image)), plan.filled[row].tolist()
    scale = filled / (plan.regions[row, 2:] - plan.regions[row, :2])
    start = np.rint(plan.regions[row, :2] * scale).astype(int).tolist()
    things = [image, target["boxes"], target["masks"]]
    things = [v2.resize(thing, np.rint(scale * stored).astype(int).tolist()) for thing in things]
    things = [v2.crop(thing, *start, *filled) for thing in things]
    if plan.flips[row]:
        things = [v2.horizontal_flip(thing) for thing in things]
    image, boxes, masks = things
    image = v2.normalize(v2.to_dtype(v2.to_image(image), torch.float32, scale=True), IMAGENET_MEAN, IMAGENET_STD)
    fill = [0, 0, size - filled[1], size - filled[0]]
    image, boxes, masks = (v2.pad(thing, fill) for thing in (image, boxes, masks))
    boxes, kept = v2.sanitize_bounding_boxes(boxes)
    return image, {"boxes": boxes, "labels": target["labels"][kept], "masks": masks[kept]}
