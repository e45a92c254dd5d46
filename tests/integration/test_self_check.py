"""A run that looks wrong says so once, in the log, events.jsonl and MLflow; `mae-scale compare`."""

import json
import shutil

import pytest
from mlflow import MlflowClient
from PIL import Image

from mae_scale.config.load import load_recipe
from mae_scale.tracking.metrics_log import MetricsLog
from mae_scale.training.reference_curves import curve_file

SMALL = ["model.patch_size=8", "model.width=32", "model.depth=1", "model.heads=2"]
SAID = "what a model gives that does not look at the images; optim.base_lr is likely too high"


def warnings(out) -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [(row["kind"], row["reason"]) for row in rows if row["event"] == "warning"]


def test_a_rate_that_fits_other_data_is_named_once_in_log_events_and_mlflow(tmp_path, digits, mae_scale):
    out = tmp_path / "runs" / "scratch"
    words = [f"data.root={digits}/train", f"data.val_root={digits}/val", *SMALL, "optim.base_lr=300"]
    words += ["schedule.epochs=10", "schedule.warmup_epochs=2", "tracking.log_every_steps=1"]
    command = ["finetune", "scratch/demo", "--out", out, *words, "tracking.evaluate_every_epochs=10"]
    first = mae_scale(*command, "schedule.stop_after_steps=16", "--tracking-uri", "off")
    again = mae_scale(*command)
    assert (first.returncode, again.returncode) == (0, 0), (first.stderr, again.stderr)
    assert first.stdout.count(SAID) == 1
    assert SAID not in again.stdout
    ((kind, text),) = warnings(out)
    assert kind == "untrained_loss"
    assert "ln(10) = 2.303" in text
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    run = client.get_run(json.loads((out / "mlflow.json").read_text())["run_id"])
    assert run.data.tags["mae_scale.warning.untrained_loss"] == text  # the start that said it had no MLflow


@pytest.fixture
def run_of_the_demo(tmp_path):
    """A folder as a run of the demo leaves it, after 12 of its epochs, with losses 10 % above its reference."""
    out, content = tmp_path / "runs" / "mine", json.loads(curve_file("demo").read_text())["curve"]
    out.mkdir(parents=True)
    load_recipe("demo", ["seed=7", "data.root=digits/train"]).save(out / "recipe.yaml")
    with MetricsLog(out / "metrics.jsonl") as log:
        for epoch in range(1, 13):
            values = {name: content[name][epoch - 1] for name in ("train/loss", "val/loss", "train/grad_norm")}
            log.append(22 * epoch, epoch, values | {"val/loss": 1.1 * values["val/loss"]})
    return out


def test_compare_holds_a_run_against_the_packaged_recipe_like_it(run_of_the_demo, tmp_path, call):
    code, said, error = call("compare", run_of_the_demo, "--out", tmp_path / "figures" / "c.png")
    assert code == 0, error
    lines = said.splitlines()
    assert next(line for line in lines if "val/loss" in line).endswith("(+10.0%)")
    assert next(line for line in lines if "train/loss" in line).endswith("(+0.0%)")
    assert "epoch 12 of 50" in said
    assert any(line.startswith("  reference: demo, ") and line.endswith("digits") for line in lines)
    with Image.open(tmp_path / "figures" / "c.png") as picture:
        assert picture.size > (700, 700)


def test_compare_says_what_differs_and_where_there_is_no_reference(run_of_the_demo, tmp_path, call):
    other = shutil.copytree(run_of_the_demo, tmp_path / "other")
    load_recipe("demo", ["model.mask_ratio=0.5"]).save(other / "recipe.yaml")
    strange = shutil.copytree(run_of_the_demo, tmp_path / "strange")
    load_recipe("pretrain/vit_large_800ep").save(strange / "recipe.yaml")
    code, said, _ = call("compare", run_of_the_demo, other, strange, "--out", tmp_path / "c.png")
    assert code == 0
    assert "digits, which has other values: model.mask_ratio: 0.75 -> 0.5" in said
    assert "no packaged recipe that was run is like this one: no reference" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere has no recipe.yaml; expected the folder of a run"),
        (["EMPTY"], "has no logged step yet"),
        (["RUN", "--out", "c.pdf"], "--out c.pdf: expected a name that ends in .png"),
        (["RUN", "--out", "/proc/c.png"], "--out /proc/c.png cannot be written"),
    ],
)
def test_compare_refuses_what_it_cannot_draw(words, said, run_of_the_demo, tmp_path, call):
    empty = tmp_path / "empty"
    empty.mkdir()
    load_recipe("demo").save(empty / "recipe.yaml")
    places = {"RUN": run_of_the_demo, "EMPTY": empty}
    code, _, error = call("compare", *(places.get(word, word) for word in words))
    assert (code, error.count("\n")) == (2, 1)
    assert said in error
