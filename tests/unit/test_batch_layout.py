"""The batch rule: a global batch is spread evenly over ranks and micro-batches, or refused with what would fit."""

import pytest

from data_pipeline.batch_layout import batch_layout
from data_pipeline.errors import UsageError


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ((64, 2, 24), "engine.micro_batch=4, 8, 16 or 32 would fit"),
        ((64, 3, 16), "63 or 66 would fit, with this batch 1, 2, 4 or 8 ranks"),
        ((8, 1, 0), "none may be below 1"),
    ],
)
def test_batch_sizes_that_do_not_divide_are_refused_saying_what_would_fit(sizes, fits):
    with pytest.raises(UsageError, match=fits):
        batch_layout(*sizes)


def test_a_micro_batch_is_at_most_the_share_of_a_rank():
    layout = batch_layout(8, 2, 16)
    assert (layout.micro_batch, layout.accumulation) == (4, 1)


def test_the_ranks_have_every_position_once_in_their_order():
    layout = batch_layout(24, 3, 4)
    assert [list(range(24)[layout.positions(rank)]) for rank in range(3)] == [
        list(range(first, first + 8)) for first in (0, 8, 16)
    ]
    with pytest.raises(UsageError, match="rank 3 of 3 ranks; expected 0 to 2"):
        layout.positions(3)
