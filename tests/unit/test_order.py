"""Order, crops and erased boxes are pure functions of (seed, step, position), distributed as torchvision's and
timm's."""

import hashlib
import random
import time

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from timm.data import random_erasing
from torchvision.transforms import RandomResizedCrop

from data_pipeline.augment.colour_jitter import jitter_slots
from data_pipeline.augment.crop import random_resized_crops
from data_pipeline.augment.kinds import augmentation
from data_pipeline.augment.random_erasing import erasing_boxes, erasing_noise
from data_pipeline.batch_order import EvaluationOrder
from data_pipeline.errors import UsageError
from data_pipeline.plan import epoch_permutation, plan_batch, steps_per_epoch
from data_pipeline.rng import generator
from tests.loaders import on_cpu

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


class Sizes:
    """An index of `count` images, random heights and widths if none are given."""

    def __init__(self, count=103, height=None, width=None):
        random = np.random.default_rng(0)
        self.height, self.width = (
            (np.full(count, side) if side else random.integers(20, 600, count)).astype(np.int32)
            for side in (height, width)
        )

    def __len__(self):
        return len(self.height)


def columns(plan) -> bytes:
    return b"".join(np.ascontiguousarray(column).tobytes() for column in vars(plan).values())


def test_generator_depends_on_every_part_of_its_key_and_on_nothing_else():
    first = generator(1, "mask", 2, 3).random(8)
    generator(1, "mask", 2, 3).random(1000)
    assert np.array_equal(first, generator(1, "mask", 2, 3).random(8))
    others = [(2, "mask", 2, 3), (1, "crop", 2, 3), (1, "mask", 3, 3), (1, "mask", 2, 4), (1, "mask", 3, 2)]
    draws = {tuple(generator(*key).random(8)) for key in others}
    assert len(draws | {tuple(first)}) == 6
    assert len({tuple(generator(0, 5, 10**12 + k, 2**40).random(4)) for k in range(50)}) == 50


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


def test_colour_jitter_draws_its_range_in_every_order():
    jitter = augmentation("random_resized_crop_color_jitter")
    plan = plan_batch(Sizes(600), jitter, seed=0, number=0, global_batch=600)
    assert 0.6 <= plan.jitter.min() < 0.61
    assert 1.39 < plan.jitter.max() <= 1.4
    assert len({tuple(order) for order in plan.jitter_order}) == 6


def test_jitter_slots_keep_the_order():
    factors = np.array([[0.5, 2.0, 1.5]] * 6)
    orders = np.array([[0, 1, 2], [1, 0, 2], [0, 2, 1], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    levels, _ = jitter_slots(factors, orders)
    used = [[(slot, float(a)) for slot, (a, _) in enumerate(image) if a != 1] for image in levels]
    assert used == [
        [(0, 0.5), (1, 2.0)],
        [(0, 2.0), (1, 0.5)],
        [(0, 0.5), (3, 2.0)],
        [(0, 2.0), (3, 0.5)],
        [(2, 0.5), (3, 2.0)],
        [(2, 2.0), (3, 0.5)],
    ]
    assert [float(b) for image in levels for a, b in image if a == 2.0] == [-1.0] * 6


def test_evaluation_gives_every_image_once_and_marks_the_filling():
    plans = [EvaluationOrder(4, rank, 2).plans(Sizes(23), on_cpu(kind="evaluation")) for rank in range(2)]
    seen = []
    for batch, both in enumerate(zip(*plans, strict=True)):
        for number, plan in both:
            assert (number, len(plan)) == (batch, 4)
            seen += plan.sample_ids[plan.valid].tolist()
    assert seen == list(range(23))


@pytest.mark.parametrize("kind", [RANDOM_RESIZED, augmentation("rand_augment", erasing=0.25)], ids=lambda k: k.name)
def test_planning_a_global_batch_of_4096_takes_milliseconds(kind):
    index = Sizes(5000)
    plan_batch(index, kind, seed=0, number=0, global_batch=4096)
    start = time.process_time()
    for _ in range(5):
        plan_batch(index, kind, seed=0, number=0, global_batch=4096, positions=slice(0, 64))
    assert (time.process_time() - start) / 5 < 0.1
