"""data.fraction: a run on a share of the images is known by them, wherever the folder lies."""

import json
import shutil

import pytest

from data_pipeline.index import load_index
from mae_scale.tracking.metrics_log import read_metrics
from tests.tiny import arguments

HALF = ["data.fraction=0.5", "tracking.uri=off"]


def test_a_run_on_half_of_the_images_goes_on_with_the_same_half_in_another_place(tmp_path, digits, mae_scale):
    out = tmp_path / "run"
    command = ["pretrain", "demo", "--out", out]
    done = mae_scale(*command, *arguments(digits, *HALF, "schedule.stop_after_steps=3"))
    assert done.returncode == 0, done.stderr
    assert "721 images" in done.stdout
    before = load_index(out / "index.npz").digest()
    elsewhere = shutil.copytree(digits, tmp_path / "elsewhere", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(next((digits / "train" / "0").glob("*.jpg")), elsewhere / "train" / "0" / "new.jpg")  # no part of it
    done = mae_scale(*command, *arguments(elsewhere, *HALF, "schedule.stop_after_steps=5"))
    assert done.returncode == 0, done.stderr
    assert load_index(out / "index.npz").digest() == before
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["epoch"] == pytest.approx(5 / 6)  # 721 images in batches of 120
    other = mae_scale(*command, *arguments(digits, "data.fraction=0.6", "tracking.uri=off"))
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "data.fraction: 0.5 -> 0.6" in other.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain", "demo", "data.fraction=0.05"], "at most 72 (data.fraction=0.05 chooses them; "),
        (["pretrain", "demo", "data.fraction=0"], "data.fraction=0"),
        (["finetune", "scratch/demo", "data.fraction=0.5"], "data.fraction and data.labels_per_class each choose"),
    ],
)
def test_a_share_that_cannot_be_trained_on_is_refused(words, said, tmp_path, digits, call):
    command, recipe, *overrides = words
    more = arguments(digits) if command == "pretrain" else [f"data.root={digits}/train"]
    code, _, error = call(command, recipe, "--out", tmp_path / "run", *more, *overrides)
    assert (code, error.count("\n")) == (2, 1), json.dumps(error)
    assert said in error
