"""`mae-scale partial-curve`: the curve of finished runs, drawn, and given to their MLflow runs."""

import json

import pytest
from mlflow import MlflowClient
from PIL import Image

from mae_scale.config.load import load_recipe


def finished(folder, top1: float, recipe: str = "partial/demo", *overrides: str):
    """What a finished run leaves of use for the curve."""
    folder.mkdir(parents=True)
    load_recipe(recipe, [*overrides, "classifier.weights=w"] if "scratch" not in recipe else []).save(
        folder / "recipe.yaml"
    )
    (folder / "evaluation.json").write_text(json.dumps({"top1": top1}))
    return folder


def test_runs_of_several_seeds_become_one_curve_in_mlflow_too(tmp_path, call):
    runs = [
        finished(tmp_path / "a", 90.0, "partial/demo", "seed=0"),
        finished(tmp_path / "b", 94.0, "partial/demo", "seed=1"),
        finished(tmp_path / "c", 80.0, "probe/demo"),
        finished(tmp_path / "d", 96.5, "finetune/demo"),
    ]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = client.create_run("0").info.run_id
    (runs[3] / "mlflow.json").write_text(json.dumps({"run_id": run_id}))
    code, said, error = call("partial-curve", *runs, "--out", tmp_path / "f" / "c.png", "--json", tmp_path / "c.json")
    assert code == 0, error
    assert "1 blocks: top-1 92.00 % +- 2.83 (2 runs)" in said
    points = {point["trained_blocks"]: point["top1"] for point in json.loads((tmp_path / "c.json").read_text())}
    assert points == {0: 80.0, 1: 92.0, 4: 96.5}
    with Image.open(tmp_path / "f" / "c.png") as picture:
        assert min(picture.size) > 300
    assert [found.path for found in client.list_artifacts(run_id, "figures")] == ["figures/c.png"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda root: root / "none", "has no recipe.yaml"),
        (lambda root: finished(root / "s", 80.0, "scratch/demo"), "did not start from pre-trained weights"),
        (lambda root: finished(root / "l", 80.0, "probe/vit_large"), "blocks; give runs of one model"),
    ],
)
def test_what_has_no_place_in_the_curve_is_one_clear_line(made, said, tmp_path, call):
    good = finished(tmp_path / "good", 90.0)
    code, _, error = call("partial-curve", good, made(tmp_path), "--out", tmp_path / "c.png")
    assert (code, error.count("\n")) == (2, 1)
    assert said in error
