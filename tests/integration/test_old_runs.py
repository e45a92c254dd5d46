"""Runs that the version before the move began go on under this one, as if nothing had happened."""

import json

import pytest
import yaml

from mae_scale.checkpoints.export import checkpoint_model
from mae_scale.config.load import load_recipe
from mae_scale.tracking.metrics_log import read_metrics
from tests.old_runs import BEFORE_THE_MOVE, RUNS, command, this_machine, unpack

EXACT = ("train/loss", "train/grad_norm", "train/lr", "val/top1", "val/loss")


def as_expected(value: float):
    """The same digits on a machine of the kind that the runs were made on; elsewhere what rounding allows."""
    same = (BEFORE_THE_MOVE / "machine.txt").read_text().strip() == this_machine()
    return value if same else pytest.approx(value, rel=2e-3)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_and_its_checkpoint_go_on_to_the_same_curve(name, tmp_path, digits, mae_scale):
    out, expected = unpack(name, tmp_path)
    stopped = RUNS[name][2]
    done = mae_scale(*command(name, out, digits))
    assert done.returncode == 0, done.stderr
    assert f"going on from step {stopped}" in done.stdout
    rows = read_metrics(out / "metrics.jsonl")
    whole = [json.loads(line) for line in expected.read_text().splitlines()]
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    assert rows[-1]["step"] > stopped
    for row, before in zip(rows, whole, strict=True):
        for metric in EXACT:
            if before.get(metric) is not None:
                assert row[metric] == as_expected(before[metric]), (row["step"], metric)


def test_a_recipe_that_an_old_run_has_stored_is_understood(tmp_path):
    out, _ = unpack("finetune_two_ranks", tmp_path)
    stored = yaml.safe_load((out / "recipe.yaml").read_text())
    assert "task" not in stored
    assert stored["data"]["labels_a_class"] == 10
    recipe = load_recipe(str(out / "recipe.yaml"))
    assert (recipe.task, recipe.data.labels_per_class) == ("classification", 10)
    model, recipe = checkpoint_model(next((out / "checkpoints").iterdir()))
    assert (model.classes, recipe.data.labels_per_class) == (10, 10)
    assert stored["classifier"]["evaluate_every_epochs"] == recipe.tracking.evaluate_every_epochs == 1


@pytest.mark.parametrize("where", ["override", "file"])
def test_the_old_name_of_a_key_is_refused_with_the_new_one(where, tmp_path, call):
    words = ["finetune", "finetune/demo", "data.labels_a_class=10"]
    if where == "file":
        (tmp_path / "recipe.yaml").write_text("extends: finetune/demo\ndata: {labels_a_class: 10}\n")
        words = ["finetune", tmp_path / "recipe.yaml"]
    code, _, error = call(*words, "--out", tmp_path / "run")
    assert (code, error.count("\n")) == (2, 1)
    assert "key 'data.labels_a_class' has a new name; write 'data.labels_per_class'" in error
    assert not (tmp_path / "run").exists()
