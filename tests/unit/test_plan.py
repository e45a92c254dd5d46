"""Order and crops are pure functions of (seed, step, position)."""

import hashlib
import time

import numpy as np
import pytest

from data_pipeline.augment.kinds import augmentation
from data_pipeline.errors import UsageError
from data_pipeline.plan import epoch_permutation, plan_batch, steps_per_epoch
from tests.plans import Sizes, columns

RANDOM_RESIZED = augmentation("random_resized_crop")
PERMUTATION = [1, 0, 4, 9, 8, 7, 3, 2, 5, 6]
SAMPLE_IDS = [53, 54, 36, 24]
CROPS = [[168, 91, 272, 245], [154, 81, 316, 410], [0, 9, 58, 66], [7, 1, 219, 258]]
FLIPS = [0, 0, 1, 1]
OPERATIONS = [[-1, -1], [14, 12], [2, -1], [-1, -1]]
ARGUMENTS = [[0, 0], [-0.38498, 0.29402], [0, 0], [0, 0]]
ERASE = [[12, 72, 48, 111], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
DIGESTS = {  # of plans made before there was RandAugment
    "random_resized_crop": "e527aa94487e9d36",
    "random_resized_crop_color_jitter": "1d5517349c25d809",
    "fixed_crop": "527971b09cc5719a",
    "none": "461fbe33a8afcf06",
    "evaluation": "461fbe33a8afcf06",
}
DIGESTED = ("positions", "sample_ids", "crops", "regions", "flips", "jitter", "jitter_order", "valid")


def test_order_and_crops_are_the_same_in_every_version():
    """Saved runs rely on these numbers: a change here breaks resuming."""
    assert epoch_permutation(0, 0, 10).tolist() == PERMUTATION
    plan = plan_batch(Sizes(), RANDOM_RESIZED, seed=7, number=40, global_batch=4)
    assert plan.sample_ids.tolist() == SAMPLE_IDS
    assert plan.crops.tolist() == CROPS
    assert plan.flips.tolist() == FLIPS
    plan = plan_batch(Sizes(), augmentation("rand_augment", erasing=0.5), seed=7, number=40, global_batch=4)
    assert plan.flips.tolist() == FLIPS
    assert plan.operations.tolist() == OPERATIONS
    assert plan.arguments.tolist() == pytest.approx(np.array(ARGUMENTS), abs=1e-5)
    assert plan.erase.tolist() == ERASE


@pytest.mark.parametrize("name", DIGESTS)
def test_plans_are_what_they_were_before_rand_augment(name):
    digest = hashlib.blake2b(digest_size=8)
    for seed, step in ((0, 0), (7, 40), (3, 10**6)):
        plan = plan_batch(Sizes(), augmentation(name), seed=seed, number=step, global_batch=24)
        for column in DIGESTED:
            digest.update(np.ascontiguousarray(getattr(plan, column)).tobytes())
        assert (plan.operations == -1).all()
        assert not plan.erase.any()
    assert digest.hexdigest() == DIGESTS[name]


def test_every_image_is_seen_exactly_once_an_epoch_but_for_the_remainder():
    index = Sizes(103)
    steps = steps_per_epoch(103, 16)
    assert steps == 6
    left_out = []
    for epoch in range(3):
        seen = np.concatenate(
            [
                plan_batch(index, RANDOM_RESIZED, seed=5, number=epoch * steps + k, global_batch=16).sample_ids
                for k in range(steps)
            ]
        )
        assert len(set(seen)) == len(seen) == 96
        left_out.append(frozenset(range(103)) - set(seen.tolist()))
    assert len(set(left_out)) == 3


def test_permutation_is_one_and_differs_by_seed_and_epoch():
    orders = [epoch_permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 4


def test_too_few_images_for_one_global_batch_is_a_clear_error():
    with pytest.raises(UsageError, match=r"data\.global_batch is 128, but there are 100 images"):
        steps_per_epoch(100, 128)


@pytest.mark.parametrize("name", ["random_resized_crop_color_jitter", "fixed_crop", "none", "rand_augment"])
def test_any_part_of_a_global_batch_is_the_part_of_the_whole(name):
    index = Sizes()
    kind = augmentation(name, erasing=0.5)
    common = {"seed": 3, "number": 17, "global_batch": 24}
    whole = plan_batch(index, kind, **common)
    assert len({tuple(box) for box in whole.erase}) > 4
    for positions in (slice(0, 12), slice(12, 24), slice(7, 8), np.array([20, 3])):
        assert columns(plan_batch(index, kind, positions=positions, **common)) == columns(whole[positions])


def test_the_same_image_at_another_step_or_position_is_cropped_anew():
    index = Sizes(64, 300, 400)
    plans = [
        plan_batch(index, RANDOM_RESIZED, seed=0, number=step, global_batch=32, sample_ids=np.zeros(32, int))
        for step in range(4)
    ]
    crops = np.concatenate([plan.crops for plan in plans])
    assert len({tuple(crop) for crop in crops}) > 120
    flips = np.concatenate([plan.flips for plan in plans])
    assert 0.3 < flips.mean() < 0.7


@pytest.mark.parametrize("kind", [RANDOM_RESIZED, augmentation("rand_augment", erasing=0.25)], ids=lambda k: k.name)
def test_planning_a_global_batch_of_4096_takes_milliseconds(kind):
    index = Sizes(5000)
    plan_batch(index, kind, seed=0, number=0, global_batch=4096)
    start = time.process_time()
    for _ in range(5):
        plan_batch(index, kind, seed=0, number=0, global_batch=4096, positions=slice(0, 64))
    assert (time.process_time() - start) / 5 < 0.1
