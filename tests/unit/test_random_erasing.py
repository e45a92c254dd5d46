"""Erased boxes are distributed as timm's; their noise belongs to a position."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from timm.data import random_erasing

from data_pipeline.augment.kinds import augmentation
from data_pipeline.augment.random_erasing import erasing_boxes, erasing_noise
from data_pipeline.plan import plan_batch
from data_pipeline.rng import generator
from tests.plans import Sizes


@pytest.mark.parametrize("size", [224, 32])
def test_erased_boxes_are_distributed_as_timms(monkeypatch, size):
    count, probability = 8000, 0.25

    class Image(list):
        def __setitem__(self, place, _):
            self.append([place[1].start, place[2].start, *(part.stop - part.start for part in place[1:])])

    monkeypatch.setattr(random_erasing, "_get_pixels", lambda *_, **__: None)
    erasing = random_erasing.RandomErasing(probability, mode="pixel", max_count=1, device="cpu")
    random.seed(0)
    images = [Image() for _ in range(count)]
    for image in images:
        erasing._erase(image, 3, size, size, torch.float32)
    theirs = np.array([box for image in images for box in image], float)
    ours = erasing_boxes(generator(0, "test", 0).random((count, 41)), size, probability)
    assert ours.dtype == np.int32
    assert not ours[ours[:, 2] == 0].any()
    ours = ours[ours[:, 2] > 0].astype(float)
    assert abs(len(ours) / count - probability) < 0.015
    assert abs(len(ours) - len(theirs)) < 4 * np.sqrt(2 * count * probability * (1 - probability))
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    assert (ours[:, 2:] < size).all()
    for quantity in (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2],
        lambda b: b[:, 3],
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
    ):
        assert ks_2samp(quantity(ours), quantity(theirs)).pvalue > 0.001


def test_noise_is_standard_normal_and_belongs_to_its_position():
    common = {"seed": 1, "number": 5, "global_batch": 16}
    plan = plan_batch(Sizes(), augmentation("none", erasing=1.0), **common)
    patches = erasing_noise(plan.erase, plan.positions, seed=1, number=5)
    assert [place[0] for place, _ in patches] == list(range(16))
    for (row, channels, *place), noise in patches:
        y, x, height, width = plan.erase[row]
        assert (channels, place) == (slice(None), [slice(y, y + height), slice(x, x + width)])
        assert (noise.shape, noise.dtype) == ((3, height, width), np.float32)
    values = np.concatenate([noise.ravel() for _, noise in patches])
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((np.abs(values) < 1).mean() - 0.6827) < 0.01
    assert len({noise[0, 0, 0] for _, noise in patches}) == 16
    (place, noise), _ = erasing_noise(plan.erase[[9, 2]], plan.positions[[9, 2]], seed=1, number=5)
    assert place[0] == 0
    assert np.array_equal(noise, patches[9][1])
    for seed, number in ((2, 5), (1, 6)):
        other = erasing_noise(plan.erase, plan.positions, seed=seed, number=number)[9][1]
        assert not np.array_equal(other, noise)
