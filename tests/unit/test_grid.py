"""The grid of `mae-scale sweep`: which runs its words ask for, and which words are refused."""

import pytest

from data_pipeline.errors import UsageError
from mae_scale.launch.grid import read_grid, split_values


def test_each_combination_has_a_name_its_overrides_and_what_its_transfer_shares():
    words = [
        "model.width:model.depth=64:2,96:4",
        "schedule.epochs=5,9",
        "data.root=/d",
        "then.schedule.epochs=7",
        "seed=3",
    ]
    points = list(read_grid("demo", words, 2).points())
    assert len(points) == 8
    assert points[1].name == "width-64_depth-2_epochs-5_seed-4"
    assert points[1].overrides == (
        "data.root=/d",
        "model.width=64",
        "model.depth=2",
        "schedule.epochs=5",
        "seed=4",
    )
    assert points[1].then_overrides == (
        "data.root=/d",
        "model.width=64",
        "model.depth=2",
        "seed=4",
        "schedule.epochs=7",
    )


def test_commas_in_brackets_and_quotes_do_not_separate_values():
    assert split_values("[0.9, 0.95],[0.9,0.999]") == ["[0.9, 0.95]", "[0.9,0.999]"]
    assert split_values("'a,b'") == ["'a,b'"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mask"], "'mask' is not part of a grid; expected section.key=value"),
        (["model.mask_ratio=0.5,,0.6"], "a value between two ',' is missing"),
        (["model.mask_ratio=0.5,0.5"], "0.5 stands there twice"),
        (["model.width:model.depth=64:2,96"], "96 has 1 values for 2 keys"),
        (["model.mask_ratio=0.5,0.6", "model.mask_ratio=0.7"], "model.mask_ratio is given twice"),
        (["then.schedule.epochs=1,2"], "one value is expected"),
        (["seed=1,2"], "give the number of seeds as --seeds N"),
        (["optim.betas=[0.9"], "a bracket or a quote is not closed"),
    ],
)
def test_words_that_are_no_grid_are_refused(words, said):
    with pytest.raises(UsageError) as refused:
        read_grid("demo", words, 1)
    assert said in str(refused.value)
