"""Augmentations by name, with options that replace parts of them."""

import numpy as np
import pytest

from data_pipeline.augment.kinds import augmentation
from data_pipeline.errors import UsageError
from data_pipeline.plan import plan_batch
from tests.plans import Sizes

RANDOM_RESIZED = augmentation("random_resized_crop")


def test_no_augmentation_draws_nothing():
    plans = [
        plan_batch(Sizes(), augmentation("none"), seed=s, number=s, global_batch=8, sample_ids=np.arange(8))
        for s in (0, 1)
    ]
    assert np.array_equal(plans[0].regions, plans[1].regions)
    assert not plans[0].flips.any()


def test_unknown_augmentation_is_a_clear_error():
    with pytest.raises(UsageError, match="unknown augmentation 'cutout'; expected one of random_resized_crop,"):
        augmentation("cutout")


def test_options_replace_parts_of_an_augmentation():
    index = Sizes(2000, 300, 400)
    kind = augmentation("rand_augment", crop_scale=0.5, flip=0.1, erasing=0.3)
    plan = plan_batch(index, kind, seed=0, number=0, global_batch=2000)
    share = plan.crops[:, 2] * plan.crops[:, 3] / (300 * 400)
    assert 0.49 < share.min() < 0.52
    assert abs(plan.flips.mean() - 0.1) < 0.03
    assert abs((plan.erase[:, 2] > 0).mean() - 0.3) < 0.04
    plan = plan_batch(index, augmentation("rand_augment"), seed=0, number=0, global_batch=2000)
    share = plan.crops[:, 2] * plan.crops[:, 3] / (300 * 400)
    assert 0.07 < share.min() < 0.1
    assert abs(plan.flips.mean() - 0.5) < 0.05
    assert augmentation("random_resized_crop") == RANDOM_RESIZED


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fixed_crop", {"crop_scale": 0.5}, "crop_scale is 0.5, but augmentation 'fixed_crop' has no random"),
        ("rand_augment", {"crop_scale": 0.0}, "crop_scale is 0.0; expected a share"),
        ("rand_augment", {"crop_scale": 1.5}, "crop_scale is 1.5; expected a share"),
        ("rand_augment", {"flip": 1.5}, "flip is 1.5; expected a probability"),
        ("rand_augment", {"erasing": -0.1}, "erasing is -0.1; expected a probability"),
    ],
)
def test_an_option_that_does_not_fit_is_a_clear_error(name, options, message):
    with pytest.raises(UsageError, match=message):
        augmentation(name, **options)
