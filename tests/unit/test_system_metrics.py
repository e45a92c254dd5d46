"""The nodes of a run by the local ranks of its ranks."""

import pytest

from mae_scale.training.system_metrics import Nodes


@pytest.mark.parametrize(
    ("rank", "local_ranks", "expected"),
    [
        (0, [0], Nodes(1, 0, 1)),
        (1, [0, 1], Nodes(1, 0, 2)),
        (2, [0, 1, 0, 1], Nodes(2, 1, 2)),
        (4, [0, 1, 2, 0, 1], Nodes(2, 1, 2)),  # nodes of different sizes
        (1, [0, 0, 0], Nodes(3, 1, 1)),
    ],
)
def test_a_rank_finds_its_node_among_the_others(rank, local_ranks, expected):
    assert Nodes.of(rank, local_ranks) == expected
