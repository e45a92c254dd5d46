"""The order of batches: each rank has its part of every global batch, and a place can be planned anew."""

import numpy as np
import pytest

from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import EvaluationOrder, TrainingOrder
from data_pipeline.plan import plan_batch
from tests.loaders import on_cpu
from tests.plans import Sizes, columns


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (2, None), (3, 4)])
def test_the_ranks_micro_batches_are_the_global_batch(world_size, micro_batch):
    index, decoding, layout = Sizes(), on_cpu(), batch_layout(24, world_size, micro_batch)
    for step in (0, 9):
        found = b""
        for rank in range(world_size):
            order = TrainingOrder(layout, rank, seed=3, start_step=step, stop_step=step + 1, batch_of=lambda s: s + 2)
            plans = list(order.plans(index, decoding))
            assert [number for number, _ in plans] == [step + 2] * layout.accumulation
            assert all(len(plan) == layout.micro_batch for _, plan in plans)
            found += b"".join(plan.sample_ids.tobytes() + plan.crops.tobytes() for _, plan in plans)
        whole = plan_batch(index, decoding.augmentation, seed=3, number=step + 2, global_batch=24, image_size=32)
        parts = [whole[first : first + layout.micro_batch] for first in range(0, 24, layout.micro_batch)]
        assert found == b"".join(part.sample_ids.tobytes() + part.crops.tobytes() for part in parts)


def test_evaluation_gives_every_image_once_and_marks_the_filling():
    plans = [EvaluationOrder(4, rank, 2).plans(Sizes(23), on_cpu(kind="evaluation")) for rank in range(2)]
    seen = []
    for batch, both in enumerate(zip(*plans, strict=True)):
        for number, plan in both:
            assert (number, len(plan)) == (batch, 4)
            seen += plan.sample_ids[plan.valid].tolist()
    assert seen == list(range(23))


def test_another_image_in_a_place_has_the_random_numbers_of_the_place():
    index, decoding = Sizes(64, 300, 400), on_cpu()  # of one size, so that equal numbers are equal crops
    order = TrainingOrder(batch_layout(24), seed=3, stop_step=1)
    ((number, plan),) = order.plans(index, decoding)
    one = order.replan(index, decoding, number, 7, image=60)
    assert one.sample_ids.tolist() == [60]
    assert columns(plan.with_row(7, one)) != columns(plan)
    one.sample_ids[:] = plan.sample_ids[7]
    assert columns(one) == columns(plan[7:8])


def test_a_replacement_is_valid_in_training_and_not_in_an_evaluation():
    orders = TrainingOrder(batch_layout(24)), EvaluationOrder(24)
    valid = [order.replan(Sizes(), on_cpu(), 0, 3, image=5).valid.tolist() for order in orders]
    assert valid == [[True], [False]]
    ((_, plan),) = orders[1].plans(Sizes(24), on_cpu())
    one = orders[1].replan(Sizes(24), on_cpu(), 0, 3, image=5)
    assert np.flatnonzero(~plan.with_row(3, one).valid).tolist() == [3]
