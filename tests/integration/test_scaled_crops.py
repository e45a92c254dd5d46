"""Large-scale jitter: pixels, boxes and masks where torchvision puts them for the same numbers."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from data_pipeline.annotations.coco import read_coco
from data_pipeline.annotations.masks import boxes_of
from data_pipeline.annotations.placing import Placing, place
from data_pipeline.augment.kinds import augmentation
from data_pipeline.bad_images import BadImagePolicy
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import EvaluationOrder, TrainingOrder
from data_pipeline.dali_graph import Decoding
from data_pipeline.errors import BadImage
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from data_pipeline.plan import plan_batch
from data_pipeline.scenes import write_scenes

SIDE, STORED, COUNT = 80, 96, 48


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = write_scenes(tmp_path_factory.mktemp("scenes") / "digits", train=COUNT, val=1, side=STORED)
    return root / "train"


@pytest.fixture(scope="module")
def index(scenes):
    return build_index(scenes / "images", progress=False)


def decoding(kind):
    return Decoding(augmentation(kind), SIDE, device="cpu")


def resized_as(plan, row):
    """The size that the whole image was resized to, and the offset (y, x) of what was taken of it."""
    scale = plan.filled[row] / (plan.regions[row, 2:] - plan.regions[row, :2])
    return np.rint(scale * STORED).astype(int).tolist(), np.rint(plan.regions[row, :2] * scale).astype(int).tolist()


def resized(thing, size):
    """torchvision takes a mask's pixel at the upper left corner of each new one (NEAREST), half a pixel aside."""
    if isinstance(thing, tv_tensors.Mask):
        thing = thing.as_subclass(torch.Tensor)
        return v2.functional.resize(thing, size, interpolation=v2.InterpolationMode.NEAREST_EXACT)
    return v2.functional.resize(thing, size)


def peer(plan, row, *things):
    """torchvision's resize, crop and flip of an image and what is annotated in it."""
    (height, width), (top, left) = resized_as(plan, row)
    cut = (top, left, *plan.filled[row].tolist())
    things = [v2.functional.crop(resized(thing, [height, width]), *cut) for thing in things]
    return [v2.functional.horizontal_flip(thing) for thing in things] if plan.flips[row] else things


def batch_of(index, kind):
    layout = batch_layout(COUNT)
    with ImageLoader(index, TrainingOrder(layout, seed=3, stop_step=1), decoding(kind)) as loader:
        (batch,) = loader
    return batch, plan_batch(index, augmentation(kind), seed=3, number=0, global_batch=COUNT, image_size=SIDE)


def test_pixels_are_torchvisions_and_nothing_is_beyond_them(index, scenes):
    batch, plan = batch_of(index, "large_scale_jitter")
    assert np.array_equal(batch.sample_ids, plan.sample_ids)
    assert (plan.filled < SIDE).any()
    assert (plan.filled == SIDE).any()
    assert 0 < plan.flips.sum() < COUNT
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
    for row, image in enumerate(batch.sample_ids):
        stored = tv_tensors.Image(Image.open(scenes / "images" / index.name(int(image))).convert("RGB"))
        (expected,) = peer(plan, row, stored)
        h, w = plan.filled[row]
        found = batch.images[row, :, :h, :w] * std + mean
        # Cubic here, bilinear there: near, and nearer the less is between the pixels.
        assert (found - expected / 255).abs().mean() < 0.03
        outside = batch.images[row].clone()
        outside[:, :h, :w] = 0
        assert (outside == 0).all()


def test_boxes_and_masks_are_torchvisions(index, scenes):
    found = read_coco(scenes / "instances.json")
    rows = {name: row for row, name in enumerate(found.names)}
    objects = found.objects
    plan = plan_batch(index, augmentation("large_scale_jitter"), seed=3, number=0, global_batch=COUNT, image_size=SIDE)
    overlaps = []
    for row, image in enumerate(plan.sample_ids):
        own = rows[index.name(int(image))]
        placing = Placing.of(plan.regions[row], plan.filled[row], plan.flips[row])
        whole = objects.of(own)
        boxes = tv_tensors.BoundingBoxes(objects.boxes[whole], format="XYXY", canvas_size=(STORED, STORED))
        (expected,) = peer(plan, row, boxes)
        assert torch.allclose(
            torch.tensor(placing.boxes(objects.boxes[whole])), expected.as_subclass(torch.Tensor), atol=1e-3
        )
        placed = place(objects, own, placing, height=STORED, width=STORED, image_size=SIDE)
        for number, taken in enumerate(placed.rows):
            runs = objects.run_lengths(int(taken))
            mask = np.repeat(np.arange(len(runs)) % 2, runs).reshape(STORED, STORED).T
            (theirs,) = peer(plan, row, tv_tensors.Mask(torch.tensor(mask)[None]))
            h, w = plan.filled[row]
            ours = placed.masks[number]
            assert not ours[h:].any()
            assert not ours[:, w:].any()
            overlaps.append([(ours[:h, :w] & theirs[0].numpy()).sum(), (ours[:h, :w] | theirs[0].numpy()).sum()])
    both, either = np.array(overlaps).T
    assert np.mean(both == either) > 0.75  # but for pixel centres that fall on the border of two stored pixels
    assert both.sum() / either.sum() > 0.99
    assert len(both) > 40


def test_a_polygon_is_moved_before_it_is_rasterised(tmp_path):
    """A triangle in a scale of ten has smooth edges, which its own mask in that scale would not."""
    about = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 8, "width": 10}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 6], "segmentation": [[1, 1, 9, 1, 1, 7]]},
            {
                "id": 2,
                "image_id": 1,
                "category_id": 1,
                "bbox": [0, 0, 2, 2],
                "segmentation": [[0, 0, 2, 0, 0, 2]],
                "iscrowd": 1,
            },
            {
                "id": 3,
                "image_id": 1,
                "category_id": 1,
                "bbox": [0, 0, 1, 1],
                "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]],
            },
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(about))
    objects = read_coco(tmp_path / "a.json").objects
    region, filled = np.array([1, 1, 8, 10], np.float32), np.array([70, 90], np.int32)
    placed = place(objects, 0, Placing.of(region, filled, 0), height=8, width=10, image_size=100)
    assert placed.rows.tolist() == [0]  # the crowd is left out, and the third is cut off
    y, x = np.mgrid[:100, :100] + 0.5
    inside = (x / 80 + y / 60 <= 1) & (x >= 0) & (y >= 0)
    mask = placed.masks[0].astype(bool)
    assert (mask & inside).sum() / (mask | inside).sum() > 0.97
    assert placed.boxes.tolist() == boxes_of(placed.masks).tolist()
    mirrored = place(objects, 0, Placing.of(region, filled, 1), height=8, width=10, image_size=100)
    assert np.mean(mirrored.masks[0, :70, :90] != placed.masks[0, :70, :90][:, ::-1]) < 0.02


def test_an_evaluation_fits_each_image_whole(index):
    order = EvaluationOrder(COUNT)
    with ImageLoader(index, order, decoding("evaluation_fit")) as loader:
        (batch,) = loader
    plan = next(order.plans(index, decoding("evaluation_fit")))[1]
    assert (plan.filled == SIDE).all()
    assert plan.regions.tolist() == COUNT * [[0, 0, STORED, STORED]]
    assert batch.images.shape == (COUNT, 3, SIDE, SIDE)
    assert not plan.flips.any()


@pytest.mark.parametrize("world_size", [1, 2])
def test_annotations_come_with_their_images_and_a_damaged_one_replaces_both(index, world_size):
    """Of every rank; the image that takes the place of another brings its own."""
    bad, seen = 5, {}

    def annotate(plan):
        if plan.sample_ids[0] == bad:
            raise BadImage("its label map is damaged")
        return int(plan.sample_ids[0]), plan.filled[0].tolist(), plan.flips[0]

    for rank in range(world_size):
        order = TrainingOrder(batch_layout(COUNT, world_size, 6), rank, seed=3, stop_step=1)
        policy = BadImagePolicy(limit=0.5)
        with ImageLoader(index, order, decoding("large_scale_jitter"), annotate=annotate, bad_images=policy) as loader:
            for batch in loader:
                assert [sample for sample, _, _ in batch.annotated] == batch.sample_ids.tolist()
                for row, (sample, filled, _) in enumerate(batch.annotated):
                    seen.setdefault(sample, []).append((filled, batch.images[row]))
            assert list(loader.bad_images.found) in ([], [index.name(bad)])
    assert sorted(seen) == [image for image in range(COUNT) if image != bad]
    assert len(seen[bad + 1]) == 2  # its own place, and that of the damaged one
    for filled, image in seen[bad + 1]:
        assert not image[:, filled[0] :].any()
        assert not image[:, :, filled[1] :].any()
        assert image[:, : filled[0], : filled[1]].any()


def test_what_replaces_a_damaged_annotation_is_what_replaces_a_damaged_image(index, scenes, tmp_path):
    """To the last bit: the neighbour, cut as the image was to be."""
    bad, layout = 5, batch_layout(COUNT)

    def annotate(plan):
        if plan.sample_ids[0] == bad:
            raise BadImage("its label map is damaged")

    order, policy = TrainingOrder(layout, seed=3, stop_step=1), BadImagePolicy(limit=0.5)
    with ImageLoader(index, order, decoding("large_scale_jitter"), annotate=annotate, bad_images=policy) as loader:
        (found,) = loader
    copied = shutil.copytree(scenes / "images", tmp_path / "images")
    damaged = build_index(copied, progress=False)
    (copied / damaged.name(bad)).write_bytes(b"no image")
    with ImageLoader(damaged, order, decoding("large_scale_jitter"), bad_images=policy) as loader:
        (expected,) = loader
    assert found.replaced == expected.replaced == 1
    assert np.array_equal(found.sample_ids, expected.sample_ids)
    assert torch.equal(found.images, expected.images)
