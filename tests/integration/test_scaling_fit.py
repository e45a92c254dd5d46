"""`mae-scale scaling fit` on the folders of finished runs."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from data_pipeline.index_build import build_index
from mae_scale.config.load import load_recipe
from mae_scale.planning.flops import mae_forward_flops, training_flops
from mae_scale.tracking.metrics_log import MetricsLog

SIZES = {"32": (32, 2), "64": (64, 3), "96": (96, 4), "128": (128, 6)}
LAW = {"E": 0.3, "A": 0.8, "alpha": 0.35}


def put_run(folder: Path, overrides: list[str], index, validation, *, steps=None, **metrics: float) -> None:
    """A folder as a finished run leaves it, with metrics at the last step of its schedule, or of `steps`."""
    recipe = load_recipe("demo", ["data.global_batch=100", *overrides])
    folder.mkdir(parents=True)
    recipe.save(folder / "recipe.yaml")
    index.save(folder / "index.npz")
    validation.save(folder / "val_index.npz")
    last = recipe.schedule.epochs * (len(index) // 100)
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.append(steps or last, recipe.schedule.epochs, {name.replace("__", "/"): v for name, v in metrics.items()})


def pflops(width: int, depth: int, epochs: int, images: int) -> float:
    each = mae_forward_flops(image_size=32, patch_size=4, width=width, depth=depth, decoder_width=64, decoder_depth=2)
    return training_flops(each) * epochs * (images // 100) * 100 / 1e15


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, digits):
    """Four sizes, 10 and 40 epochs, two seeds around the law; and a run that is worse than what is cheaper."""
    root = tmp_path_factory.mktemp("sweeps") / "sizes"
    index, validation = (build_index(digits / part, progress=False) for part in ("train", "val"))
    for name, (width, depth) in SIZES.items():
        for epochs in (10, 40):
            on_law = LAW["E"] + LAW["A"] * pflops(width, depth, epochs, len(index)) ** -LAW["alpha"]
            for seed, factor in ((0, 0.99), (1, 1.01)):
                words = [f"model.width={width}", f"model.depth={depth}", f"schedule.epochs={epochs}", f"seed={seed}"]
                values = {"train__loss": 0.9 * on_law, "val__loss": factor * on_law}
                put_run(root / f"w{name}_e{epochs}_s{seed}", words, index, validation, **values)
    words = ["model.width=128", "model.depth=6", "schedule.epochs=20", "optim.base_lr=1"]
    put_run(root / "bad", words, index, validation, train__loss=9, val__loss=9)
    return root


def test_the_law_behind_the_runs_is_found_and_the_largest_predicted(sweep, tmp_path, call):
    code, said, error = call("scaling", "fit", sweep, "--out", tmp_path / "f.png", "--json", tmp_path / "f.json")
    assert code == 0, error
    found = json.loads((tmp_path / "f.json").read_text())
    assert {name: found["law"][name] for name in LAW} == pytest.approx(LAW, rel=1e-3)
    assert len(found["points"]) == 9
    assert [point["runs"] for point in found["points"] if point["name"] != "bad"] == [2] * 8
    (bad,) = [point for point in found["points"] if not point["on_frontier"]]
    assert (bad["name"], bad["size"]) == ("bad", "128x6")
    largest = found["points"][-1]
    assert largest["name"].startswith("w128_e40")
    told = found["prediction_of_largest"]
    assert told["y"] == pytest.approx(largest["y"], rel=1e-3)
    assert 0.999 * told["low"] < largest["y"] < 1.001 * told["high"]  # the points lie on the law: the band is a line
    assert "val/loss against training compute (PFLOPs): 17 runs, 9 points, 8 of them on the frontier" in said
    assert "the largest on the frontier, w128_e40_s0: the others predict" in said
    with Image.open(tmp_path / "f.png") as picture:
        assert picture.size > (800, 600)


def test_the_transfer_that_follows_a_point_gives_its_error(sweep, tmp_path, digits, call):
    root = shutil.copytree(sweep, tmp_path / "sweep", ignore=shutil.ignore_patterns("*_s1", "bad"))
    index, validation = (build_index(digits / part, progress=False) for part in ("train", "val"))
    for row, folder in enumerate(sorted(root.iterdir())):
        words = ["task=classification", "classifier.trained_blocks=0", "data.fraction=0.5"]
        put_run(folder / "then", words, index, validation, train__loss=1, val__top1=90 - row % 2 - row / 10)
    code, said, error = call("scaling", "fit", root, "--y", "top1", "--x", "epochs")
    assert (code, error.count("\n")) == (2, 1)
    assert "points are on the frontier of top1 against epochs (better than all with less)" in error
    code, said, error = call("scaling", "fit", root, "--y", "top1", "--x", "parameters")
    assert code == 2 or "error (100 - top1, %)" in said


def broken(change: str, sweep: Path, root: Path, digits: Path) -> Path:
    """A copy of the sweep with one run that does not belong there."""
    if change == "empty":
        root.mkdir()
        return root
    shutil.copytree(sweep, root)
    index, validation = (build_index(digits / part, progress=False) for part in ("train", "val"))
    put = {"train__loss": 1.0, "val__loss": 1.0}
    if change == "unfinished":
        put_run(root / "x", ["schedule.epochs=7"], index, validation, steps=21, **put)
    elif change == "not measured":
        put_run(root / "x", ["schedule.epochs=7"], index, validation, train__loss=1.0)
    elif change == "not finite":
        put_run(root / "x", ["schedule.epochs=7"], index, validation, train__loss=1.0, val__loss=float("nan"))
    elif change == "other images":
        put_run(root / "x", ["schedule.epochs=7"], index, validation.share(0.5, seed=0), **put)
    else:
        put_run(root / "x", ["schedule.epochs=7", change], index, validation, **put)
    return root


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ("unfinished", [], "x has done 21 of 98 steps; a fit takes the value at the end of a schedule"),
        ("not measured", [], "x has no finite val/loss at its end; it is measured with data.val_root"),
        ("not finite", [], "x has no finite val/loss at its end"),
        ("other images", [], "their val/loss cannot be compared"),
        ("model.mask_ratio=0.5", [], "has model.mask_ratio 0.5"),
        ("model.target=pixels", [], "has model.target pixels"),
        ("empty", [], "has no folders of runs; expected"),
        ("seed=3", ["--x", "flops"], "--x flops is not known; expected compute, epochs, images, parameters"),
        ("seed=3", ["--y", "val/los"], "(did you mean val/loss?)"),
        ("seed=3", ["--x", "images"], "1 of 10 points are on the frontier of val/loss against images"),
        ("seed=3", ["--shift"], "a power law with a shift needs 10 points, found"),
        ("seed=3", ["--out", "fit.pdf"], "--out fit.pdf: expected a name that ends in .png"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(change, options, said, sweep, tmp_path, digits, call):
    root = broken(change, sweep, tmp_path / "sweep", digits)
    code, _, error = call("scaling", "fit", root, *options)
    assert (code, error.count("\n")) == (2, 1)
    assert said in error


def test_a_few_points_are_given_no_irreducible_term(sweep, tmp_path, call):
    root = shutil.copytree(sweep, tmp_path / "sweep", ignore=shutil.ignore_patterns("*_e10_*", "bad"))
    code, said, _ = call("scaling", "fit", root, "--json", tmp_path / "f.json")
    assert code == 0
    assert "no irreducible term: that takes 6 points on the frontier" in said
    assert json.loads((tmp_path / "f.json").read_text())["law"]["E"] == 0


def test_the_fit_of_a_sweep_is_shown_on_its_parent_run(sweep, tmp_path, call):
    root, uri = shutil.copytree(sweep, tmp_path / "sizes"), f"sqlite:///{tmp_path}/mlflow.db"
    for path in root.glob("*/recipe.yaml"):
        load_recipe(str(path), ["tracking.sweep=sizes", f"tracking.uri={uri}"]).save(path)
    for _ in range(2):
        code, _, error = call("scaling", "fit", root)
        assert code == 0, error
    client = MlflowClient(uri)
    (parent,) = client.search_runs([client.get_experiment_by_name("mae-scale").experiment_id])
    assert parent.info.run_name == "sizes"
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == [
        "fit_compute_val_loss.png",
        "fit_compute_val_loss_table.json",
    ]
    table = json.loads(
        (tmp_path / client.download_artifacts(parent.info.run_id, "fit_compute_val_loss_table.json")).read_text()
    )
    assert len(table["data"]) == 9
