"""A recipe's task: which command trains it, and what is refused."""

import pytest

from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe, packaged_recipes
from mae_scale.config.schema import Recipe
from mae_scale.tasks.registry import TASKS, task_for, task_of


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_packaged_recipe_names_a_task_that_is_registered(name, tmp_path):
    recipe = load_recipe(name)
    assert isinstance(task_of(recipe, tmp_path), TASKS[recipe.task])
    pretrains = name in ("demo", "paper/mae", "paper/beit", "paper/moco", "paper/tokeniser") or "pretrain/" in name
    assert (TASKS[recipe.task].command == "pretrain") == pretrains


def test_a_recipe_without_a_task_is_understood_by_its_sections():
    assert Recipe().task == "mae"
    assert Recipe.model_validate({"classifier": {"pool": "cls"}}).task == "classification"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("pretrain", "finetune/demo"), "the recipe's task is classification, and `mae-scale pretrain` does not train"),
        (
            ("finetune", "demo"),
            "the recipe's task is mae, and `mae-scale finetune` does not train that; use `mae-scale",
        ),
        (("pretrain", "demo", "task=rotation"), "task: rotation is not known; expected one of mae, "),
        (("pretrain", "demo", "classifier.pool=cls"), "task: mae, and a section classifier"),
        (("finetune", "demo", "task=classification"), "task: classification, and no section classifier"),
        (("probe", "finetune/demo", "classifier.trained_blocks=1"), "linear probing trains the head alone"),
    ],
)
def test_a_recipe_of_another_task_is_refused_in_one_line(words, says, call, tmp_path):
    code, _, error = call(words[0], words[1], "--out", tmp_path / "run", *words[2:])
    assert (code, error.count("\n")) == (2, 1), error
    assert says in error
    assert not (tmp_path / "run").exists()


def test_the_right_command_is_named(tmp_path):
    with pytest.raises(UsageError, match="use `mae-scale finetune` for it"):
        task_for("pretrain", load_recipe("probe/demo"), tmp_path)
