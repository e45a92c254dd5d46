"""What ranks do together gives every rank the same: rank 0's value, its error, or the error of any one of them."""

from pathlib import Path

import pytest

from tests.integration.ranks import run_worker

REFUSED = ["UsageError", "no such folder; give another", True]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, list]:
    """{case: [the answer of each of three ranks]}."""
    return run_worker(Path(__file__).parent / "collectives_worker.py", {}, 3, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("value", ["result", "of rank 0"]),
        ("refused", REFUSED),
        ("full", ["RunError", "shard: No space left on device", True]),
        ("first, then others", ["result", "by rank 0"]),
        ("first fails", REFUSED),
        ("all", ["result", [0, 1, 2]]),
        ("one fails", ["RunError", "rank 1: shard: No space left on device", True]),
    ],
)
def test_every_rank_has_the_same_value_or_error(case, expected, answers):
    assert answers[case] == [expected] * 3
