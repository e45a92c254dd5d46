"""The scenes of digits on photographs: their annotations are exact, and training and validation share no digit."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from data_pipeline import scenes as scenes_module
from data_pipeline.annotations.coco import read_coco
from data_pipeline.annotations.masks import run_lengths
from data_pipeline.errors import UsageError
from data_pipeline.scenes import BACKGROUND, write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes") / "digits", train=40, val=12, side=96)


def mask_of(objects, row, side=96):
    runs = objects.run_lengths(row)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(side, side).T


@pytest.mark.parametrize(("part", "count"), [("train", 40), ("val", 12)])
def test_masks_boxes_and_label_maps_say_the_same(scenes, part, count):
    found = read_coco(scenes / part / "instances.json")
    objects = found.objects
    assert (len(found.names), found.bad) == (count, [])
    assert sorted(path.name for path in (scenes / part / "images").iterdir()) == found.names
    numbers = np.diff(objects.first)
    assert numbers.min() >= 1
    assert numbers.max() == 2
    for image, name in enumerate(found.names):
        labels = np.array(Image.open(scenes / part / "labels" / name.replace("jpg", "png")))
        expected = np.full((96, 96), BACKGROUND)
        for row in range(*objects.of(image).indices(len(objects))):
            mask = mask_of(objects, row)
            assert (expected[mask] == BACKGROUND).all()  # no pixel has two owners
            expected[mask] = objects.category[row] + 1
            y, x = np.nonzero(mask)
            assert objects.boxes[row].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert np.array_equal(labels, expected)


def test_pycocotools_reads_the_same_masks(scenes):
    coco = pytest.importorskip("pycocotools.coco").COCO(scenes / "val" / "instances.json")
    objects = read_coco(scenes / "val" / "instances.json").objects
    for row, number in enumerate(objects.ids):
        assert np.array_equal(coco.annToMask(coco.anns[int(number)]), mask_of(objects, row))
        assert coco.anns[int(number)]["area"] == mask_of(objects, row).sum()


def test_digits_are_apart_cover_each_other_and_stand_out(scenes):
    parts = [json.loads((scenes / part / "instances.json").read_text())["annotations"] for part in ("train", "val")]
    train, val = ({annotation["digit"] for annotation in part} for part in parts)
    assert not train & val
    assert {annotation["category_id"] for annotation in parts[0]} == set(range(1, 11))
    contrasts, touching = [], 0
    for image in range(12):
        pixels = np.array(Image.open(scenes / "val" / "images" / f"{image:06d}.jpg")).mean(2)
        labels = np.array(Image.open(scenes / "val" / "labels" / f"{image:06d}.png"))
        right = (labels[:, 1:] != labels[:, :-1]) & (labels[:, 1:] != BACKGROUND) & (labels[:, :-1] != BACKGROUND)
        touching += right.any()
        around = pixels[labels == BACKGROUND].mean()
        contrasts += [pixels[labels == label].mean() - around for label in np.unique(labels[labels != BACKGROUND])]
    assert touching >= 1
    assert np.median(np.abs(contrasts)) > 50
    assert 0.2 < np.mean(np.array(contrasts) > 0) < 0.8  # light and dark


def test_at_least_half_of_each_digit_stays_visible(monkeypatch, tmp_path):
    """Of the pixels that it was painted with: those of all attempts are noted, and its own hold what is seen of it."""
    place, paint = scenes_module._placed, scenes_module.paint
    tried, shares = [], []

    def noted(*given):
        tried.append(place(*given))
        return tried[-1]

    def watched(*given):
        tried.clear()
        scene = paint(*given)
        wholes = [opacity >= scenes_module.EDGE for opacity in tried]
        for mask in scene.masks:
            shares.append(max(mask.sum() / whole.sum() for whole in wholes if not (mask & ~whole).any()))
        return scene

    monkeypatch.setattr(scenes_module, "_placed", noted)
    monkeypatch.setattr(scenes_module, "paint", watched)
    write_scenes(tmp_path / "scenes", train=90, val=1, side=64)
    assert min(shares) >= 0.5
    assert sum(share < 1 for share in shares) > 20


def test_a_second_call_leaves_them_and_another_folder_has_the_same_bytes(scenes, tmp_path):
    def digest(root):
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return [(path.relative_to(root), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]

    before = digest(scenes)
    write_scenes(scenes, train=40, val=12, side=96)
    assert digest(scenes) == before == digest(write_scenes(tmp_path / "again", train=40, val=12, side=96))
    with pytest.raises(UsageError, match="is not empty"):
        write_scenes(scenes, train=41, val=12, side=96)


@pytest.mark.parametrize(
    ("mask", "runs"),
    [
        ([[0, 0], [0, 0]], [4]),
        ([[1, 1], [1, 1]], [0, 4]),
        ([[0, 1], [1, 0]], [1, 2, 1]),
        ([[1, 0, 0], [0, 0, 1]], [0, 1, 4, 1]),
    ],
)
def test_run_lengths_go_down_the_columns_and_begin_outside(mask, runs):
    assert run_lengths(np.array(mask, bool)) == runs
