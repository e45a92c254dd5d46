"""Colour jitter: factors and their order."""

import numpy as np

from data_pipeline.augment.colour_jitter import jitter_slots
from data_pipeline.augment.kinds import augmentation
from data_pipeline.plan import plan_batch
from tests.plans import Sizes


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
