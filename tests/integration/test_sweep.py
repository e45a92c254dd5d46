"""`mae-scale sweep`: a grid of ordinary runs, each followed by a transfer, below one parent run in MLflow."""

import json
import shutil

import pytest
from mlflow import MlflowClient

from tests.tiny import arguments


def sweep_of(digits, out, *more) -> list:
    words = ["sweep", "demo", "model.mask_ratio=0.5,0.75", "--then", "probe/demo", "then.schedule.epochs=6"]
    return [*words, "--out", out, *arguments(digits, *more)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, digits, mae_scale):
    """A sweep over two mask ratios: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("sweep") / "ratios"
    done = mae_scale(*sweep_of(digits, out))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_the_results_are_those_of_ordinary_runs_and_of_the_transfers_from_them(swept):
    out, said = swept
    points = json.loads((out / "results.json").read_text())["points"]
    assert [point["values"] for point in points] == [{"mask_ratio": "0.5"}, {"mask_ratio": "0.75"}]
    for point, name in zip(points, ("mask_ratio-0.5_seed-0", "mask_ratio-0.75_seed-0"), strict=True):
        assert point["done"] == point["runs"] == 1
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        assert point["metrics"]["val/loss"]["values"] == [rows[-1]["val/loss"]]
        measured = json.loads((out / name / "then" / "evaluation.json").read_text())
        assert point["metrics"]["then_top1"]["mean"] == pytest.approx(measured["top1"])
    assert "mask_ratio  runs  val/loss" in said


def test_mlflow_has_one_parent_with_the_table_and_figure_and_all_runs_as_its_children(swept):
    out, _ = swept
    client = MlflowClient(f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("mae-scale").experiment_id
    runs = client.search_runs([experiment])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert (parent.info.run_name, parent.info.status) == ("ratios", "FINISHED")
    assert [run.data.tags["mlflow.parentRunId"] for run in runs if run is not parent] == 4 * [parent.info.run_id]
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"results.png", "results_table.json"}
    assert "| 0.75 | 1/1 |" in parent.data.tags["mlflow.note.content"]


def test_a_second_call_trains_only_what_is_missing(swept, tmp_path, digits, mae_scale):
    out = shutil.copytree(swept[0], tmp_path / "ratios")
    kept = (out / "mask_ratio-0.5_seed-0" / "metrics.jsonl").read_bytes()
    shutil.rmtree(out / "mask_ratio-0.75_seed-0")
    done = mae_scale(*sweep_of(digits, out, f"tracking.uri=sqlite:///{out}/mlflow.db"))
    assert done.returncode == 2
    assert "holds another sweep" in done.stderr
    done = mae_scale(*sweep_of(digits, out))
    assert done.returncode == 0, done.stderr
    assert (out / "mask_ratio-0.5_seed-0" / "metrics.jsonl").read_bytes() == kept
    assert f"{out}/mask_ratio-0.5_seed-0: done already" in done.stdout
    assert (out / "mask_ratio-0.75_seed-0" / "then" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mask_ratio=0.4,0.6"], "unknown key 'mask_ratio'; did you mean 'model.mask_ratio'?"),
        (
            ["model.mask_ratio=0.4,1.6"],
            "mask_ratio-1.6_seed-0: recipe demo: model.mask_ratio=1.6: input should be less",
        ),
        (["data.global_batch=7", "--nproc", "2"], "data.global_batch=7 is not divisible by 2 ranks"),
        (["then.schedule.epochs=3"], "then.schedule.epochs=3 is for a transfer after each run; add --then RECIPE"),
        (["--then", "pretrain/vit_base_800ep"], "does not start from weights; expected a classifier"),
        (["--then", "probe/vit_base", "model.depth=3"], "data.global_batch is 16384, but there are 1442 images"),
        (
            ["--then", "probe/demo", "then.model.depth=3"],
            "it starts from seed-0, and these are weights of a ViT (patch 8",
        ),
        (["data.root=/not/there"], "the data folder /not/there does not exist; give an image folder"),
        (["--name", "it's"], "the sweep's name \"it's\" is not possible"),
        (["--slurm"], "Slurm is not found here"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_before_anything_is_started(
    words, said, tmp_path, digits, call, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, error = call("sweep", "demo", "--out", tmp_path / "new", *arguments(digits), *words)
    assert (code, error.count("\n")) == (2, 1)
    assert said in error
    assert not (tmp_path / "new").exists()


def test_a_damaged_list_of_runs_is_named(tmp_path, digits, call):
    (tmp_path / "sweep.json").write_text("{")
    code, _, error = call("sweep", "demo", "--out", tmp_path, *arguments(digits))
    assert (code, error.count("\n")) == (2, 1)
    assert f"{tmp_path}/sweep.json cannot be read" in error
