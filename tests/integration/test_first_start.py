"""A start that is refused or fails before its first step leaves nothing that the corrected command trips over."""

import json
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from mae_scale.models.classifier import build_classifier
from mae_scale.models.weights.classifier import classifier_to_official
from tests.integration.test_decoding_failures import BAD
from tests.tiny import arguments, losses

pytestmark = pytest.mark.timeout(600)

QUICK = ["engine.backend=fairscale", "engine.zero_stage=1", "schedule.stop_after_steps=1"]


def weights_file(path: Path, width: int) -> Path:
    """A file of weights of a tiny classifier without its head."""
    model = build_classifier(None, classes=10, image_size=32, patch_size=8, width=width, depth=2, heads=2)
    state = {k: v for k, v in classifier_to_official(model).items() if not k.startswith(("head.", "fc_norm."))}
    torch.save({"model": state}, path)
    return path


@pytest.fixture
def places(digits, tmp_path) -> dict[str, Path]:
    """What the wrong commands and the right one name."""
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("0", "zebra"):
        (tmp_path / "others" / name).mkdir(parents=True)
        (tmp_path / "others" / name / "1.jpg").write_bytes(next((digits / "val" / "0").glob("*.jpg")).read_bytes())
    (tmp_path / "empty").mkdir()
    found = {name: tmp_path / name for name in ("text.pth", "others", "empty", "missing")}
    wide, right = weights_file(tmp_path / "wide.pth", 64), weights_file(tmp_path / "right.pth", 32)
    return found | {"wide.pth": wide, "right.pth": right, "val": digits / "val"}


# weights, val_root, more, what is said
WRONG = [
    ("text.pth", "val", [], "text.pth"),
    ("wide.pth", "val", [], "width 64"),
    ("missing", "val", [], "does not exist"),
    ("right.pth", "missing", [], "does not exist"),
    ("right.pth", "empty", [], "no image in"),
    ("right.pth", "others", [], "zebra"),
    ("right.pth", "val", ["data.global_batch=2000"], "there are 1442 images"),
]


def test_what_is_wrong_is_refused_before_anything_is_written_and_the_right_command_then_runs(
    places, digits, call, mae_scale, tmp_path
):
    out = tmp_path / "r"

    def words(weights: str, val_root: str, *more: str) -> list:
        recipe = [word for word in arguments(digits, *QUICK) if "decoder" not in word]
        command = ["finetune", "finetune/demo", "--weights", places[weights], "--out", out, "--tracking-uri", "off"]
        return [*command, *recipe, "data.labels_per_class=null", f"data.val_root={places[val_root]}", *more]

    for weights, val_root, more, said in WRONG:
        code, _, error = call(*words(weights, val_root, *more), "--nproc", 2)
        assert (code, error.count("\n")) == (2, 1), error
        assert said in error
        assert not out.exists(), said
    out.mkdir()  # of the user's own
    assert call(*words("right.pth", "empty"), "--nproc", 2)[0] == 2
    assert list(out.iterdir()) == []
    done = mae_scale(*words("right.pth", "val"))
    assert done.returncode == 0, done.stderr
    assert list(losses(out)) == [1]
    code, _, error = call(*words("right.pth", "val", "seed=1"), "--nproc", 2)
    assert (code, error.count("\n")) == (2, 1), error
    assert "another recipe (seed: 0 -> 1)" in error  # now it has a step


@pytest.fixture(scope="module")
def second_try(tmp_path_factory, digits, mae_scale):
    """A folder where a run failed in its first step, then one of another recipe ran: it, and the first's MLflow run."""
    root = tmp_path_factory.mktemp("second")
    out, data = root / "r", root / "data"
    data.mkdir()
    images = sorted((digits / "train").rglob("*.jpg"))[:130]
    for number, image in enumerate(images):
        content = image.read_bytes()
        (data / f"{number:03d}.jpg").write_bytes(BAD["huffman tables"](content) if number < 20 else content)
    words = ["pretrain", "demo", "--out", out, *arguments(digits), *QUICK, f"data.root={data}", "data.val_root=null"]
    failed = mae_scale(*words, "data.on_bad_image=stop", "data.bad_image_limit=0")
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert (out / "recipe.yaml").exists()
    first = json.loads((out / "mlflow.json").read_text())["run_id"]
    for number, image in enumerate(images[:125]):
        (data / f"{number:03d}.jpg").write_bytes(image.read_bytes())
    (data / "129.jpg").unlink()
    done = mae_scale(*words, "model.mask_ratio=0.5", "seed=3")
    assert done.returncode == 0, done.stderr
    return out, first, done.stdout


def test_a_folder_without_a_step_takes_another_recipe_and_other_images(second_try):
    out, first, said = second_try
    assert "129 images, " in said
    assert list(losses(out)) == [1]
    assert "mask_ratio: 0.5" in (out / "recipe.yaml").read_text()
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "start" for event in events) == 1
    client = MlflowClient(f"sqlite:///{out.parent}/mlflow.db")
    run = client.get_run(json.loads((out / "mlflow.json").read_text())["run_id"])
    assert run.info.run_id != first
    assert (run.data.params["model.mask_ratio"], run.data.params["seed"]) == ("0.5", "3")
    assert not [tag for tag in run.data.tags if tag.startswith("param.")]
    assert client.get_run(first).info.status == "FAILED"


def test_versions_and_settings_as_they_were_used_are_in_mlflow_engine_json_and_the_headline(second_try):
    import deepspeed
    import torch
    from nvidia import dali

    import mae_scale

    out, _, said = second_try
    client = MlflowClient(f"sqlite:///{out.parent}/mlflow.db")
    run = client.get_run(json.loads((out / "mlflow.json").read_text())["run_id"])
    libraries = {"mae-scale": mae_scale, "torch": torch, "deepspeed": deepspeed, "dali": dali}
    for name, library in libraries.items():
        assert run.data.tags[f"version.{name}"] == library.__version__.partition("+")[0], name
    gpu = torch.cuda.is_available()
    expected = {
        "engine.precision": "bf16" if gpu else "fp32",
        "engine.micro_batch": 120,
        "engine.compile": gpu,
        "engine.zero_stage": 1,
        "data.device": "gpu" if gpu else "cpu",
    }
    used = json.loads((out / "engine.json").read_text())["used"]
    assert used == expected
    assert {key: run.data.params[key] for key in used} == {key: str(value) for key, value in expected.items()}
    assert f"; {expected['engine.precision']}, blocks {'' if gpu else 'not '}compiled, images decoded on the " in said
