"""Crops are distributed as torchvision's."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from data_pipeline.augment.crop import random_resized_crops, scaled_regions
from data_pipeline.augment.kinds import augmentation
from data_pipeline.plan import plan_batch
from data_pipeline.rng import generator
from tests.plans import Sizes


@pytest.mark.parametrize(("height", "width"), [(375, 500), (100, 40), (600, 130), (32, 32)])
def test_crops_are_distributed_as_torchvisions(height, width):
    count = 4000
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], float)
    draws = generator(0, "test", 0).random((count, 40))
    ours = random_resized_crops(
        draws, np.full(count, height), np.full(count, width), (0.2, 1.0), (3 / 4, 4 / 3)
    ).astype(float)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for quantity in (
        lambda c: c[:, 0],
        lambda c: c[:, 1],
        lambda c: c[:, 2],
        lambda c: c[:, 3],
        lambda c: c[:, 2] * c[:, 3],
        lambda c: c[:, 3] / c[:, 2],
        lambda c: c[:, 0] + c[:, 2] / 2,
    ):
        assert ks_2samp(quantity(ours), quantity(theirs)).pvalue > 0.001


@pytest.mark.parametrize(("height", "width"), [(10, 3000), (3000, 10), (1, 1), (7, 900)])
def test_an_image_that_no_attempt_fits_falls_back_as_torchvision_does(height, width):
    image = torch.empty(3, height, width)
    theirs = RandomResizedCrop.get_params(image, [0.9, 1.0], [3 / 4, 4 / 3])
    draws = np.full((1, 40), 0.999)
    ours = random_resized_crops(draws, np.array([height]), np.array([width]), (0.9, 1.0), (3 / 4, 4 / 3))
    assert tuple(ours[0]) == theirs


def test_fixed_crops_have_one_size_and_every_offset():
    count = 2000
    plan = plan_batch(
        Sizes(count, 256, 512),
        augmentation("fixed_crop"),
        seed=0,
        number=0,
        global_batch=count,
        image_size=224,
    )
    sides = plan.regions[:, 2:] - plan.regions[:, :2]
    assert np.array_equal(sides, np.full((count, 2), 224, np.float32))
    assert set(plan.regions[:, 0]) == set(range(33))
    assert (plan.regions[:, 1].min(), plan.regions[:, 1].max()) == (0, 288)


@pytest.mark.parametrize(
    ("scale", "by_shorter", "region", "filled"),
    [
        ((1, 1), False, (0, 0, 40, 80), (16, 32)),
        ((2, 2), False, (0, 10, 40, 50), (32, 32)),
        ((4, 4), False, (5, 15, 25, 35), (32, 32)),
        ((1, 1), True, (0, 30, 40, 70), (32, 32)),
        ((2, 2), True, (5, 45, 25, 65), (32, 32)),
        ((0.5, 0.5), True, (0, 0, 40, 80), (16, 32)),
    ],
)
def test_scaled_regions_of_a_wide_image_follow_its_longer_or_its_shorter_side(scale, by_shorter, region, filled):
    """40 x 80 px to 32 x 32: a part lies at one share of the room in both directions, or by_shorter at one of each."""
    draws = np.array([[0.5, 0.25, 0.75]])
    regions, sizes = scaled_regions(draws, np.array([[40, 80]]), scale, 32, by_shorter=by_shorter)
    assert regions.tolist() == [pytest.approx(region)]
    assert sizes.tolist() == [list(filled)]
