"""Images that are not square, as a user trains on them: digits cut to [32, 64] px, through every command."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import mae_scale as package
from mae_scale.checkpoints.export import checkpoint_model
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.models.classifier import Classifier
from mae_scale.tracking.metrics_log import read_metrics
from tests.tiny import arguments, losses, stored

pytestmark = pytest.mark.timeout(600)

WIDE = "model.image_size=[32,64]"  # 4 x 8 patches
OFF = ["--tracking-uri", "off"]
SHORT = ["data.global_batch=24", "schedule.epochs=2", "tracking.log_every_steps=1", "data.labels_per_class=10"]
AUGMENTED = ["data.augmentation=rand_augment", "data.random_erasing=0.25", "model.drop_path=0.2"]
AUGMENTED += ["classifier.mixup=0.8", "classifier.cutmix=1.0"]


def few(digits: Path, *more: str) -> list[str]:
    """Overrides of a tiny classifier on ten labels per class."""
    return [word for word in arguments(digits, *SHORT, *more) if "decoder" not in word]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, digits, mae_scale):
    """A pre-training that was stopped after four steps and went on to the eighth: its folder."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    for steps in (4, 8):
        recipe = arguments(digits, WIDE, f"schedule.stop_after_steps={steps}", "model.masking=block")
        done = mae_scale("pretrain", "demo", "--out", out, *OFF, *recipe)
        assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, digits, mae_scale, pretrained):
    """A fine-tuning from it, with every augmentation, kept in MLflow: its folder."""
    out = tmp_path_factory.mktemp("finetuned") / "run"
    command = ["finetune", "finetune/demo", "--weights", pretrained, "--out", out]
    done = mae_scale(*command, *few(digits, WIDE, *AUGMENTED))
    assert done.returncode == 0, done.stderr
    assert "28 tensors from" in done.stdout
    return out


def test_a_pre_training_goes_on_bit_for_bit(pretrained, digits, mae_scale, tmp_path):
    recipe = arguments(digits, WIDE, "schedule.stop_after_steps=8", "model.masking=block")
    done = mae_scale("pretrain", "demo", "--out", tmp_path / "whole", *OFF, *recipe)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "whole") == losses(pretrained)
    assert losses(pretrained)[8] < losses(pretrained)[1]
    whole, resumed = (
        stored(list_checkpoints(out / "checkpoints")[-1][1], "weight") for out in (tmp_path / "whole", pretrained)
    )
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_the_size_is_in_the_recipe_and_the_pictures(pretrained):
    assert yaml.safe_load((pretrained / "recipe.yaml").read_text())["model"]["image_size"] == [32, 64]
    (picture,) = (pretrained / "figures" / "reconstructions").glob("*8.png")
    with Image.open(picture) as image:
        assert image.width > 8 * 256  # eight images beside each other, four times as large
    encoder = package.load_encoder(pretrained)
    assert encoder.image_size == (32, 64)
    assert encoder.forward_features(torch.zeros(1, 3, 32, 64)).shape == (1, 33, 32)
    assert encoder.transform(Image.new("RGB", (100, 100))).shape == (3, 32, 64)


def test_another_size_of_the_same_run_is_refused(pretrained, digits, mae_scale):
    recipe = arguments(digits, "model.image_size=[64,32]", "schedule.stop_after_steps=9", "model.masking=block")
    done = mae_scale("pretrain", "demo", "--out", pretrained, *OFF, *recipe)
    assert (done.returncode, "model.image_size: [32, 64] -> [64, 32]" in done.stderr) == (2, True), done.stderr


def test_a_classifier_is_evaluated_from_its_run_and_from_its_file(finetuned, digits, mae_scale, tmp_path):
    rows = read_metrics(finetuned / "metrics.jsonl")
    command = ["evaluate", "finetune/demo", *few(digits, WIDE), "--json", tmp_path / "answer.json"]
    for weights in (finetuned, finetuned / "export" / "model.safetensors"):
        done = mae_scale(*command, "--weights", weights)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "answer.json").read_text())["top1"] == rows[-1]["val/top1"]
    done = mae_scale(*command, "--weights", finetuned, "--set", "imagenet-c")
    assert (done.returncode, "square crops, which model.image_size=[32,64] would stretch" in done.stderr) == (2, True)
    assert (finetuned / "figures" / "attention.png").exists()
    done = mae_scale("export", finetuned, tmp_path / "timm", "--format", "timm")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 32, 64]


def test_mlflow_serves_images_of_that_size(finetuned, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finetuned.parent / 'mlflow.db'}")
    kept = json.loads((finetuned / "export" / "mlflow_model.json").read_text())
    served = mlflow.pyfunc.load_model(kept["model_uri"])
    assert served.metadata.signature.inputs.inputs[0].shape == (-1, 32, 64, 3)
    found = served.predict(np.full((2, 32, 64, 3), 100, np.float32))
    assert found.shape == (2, 10)
    assert np.allclose(found.sum(axis=1), 1, atol=1e-5)


def test_a_square_pre_training_is_fine_tuned_to_rectangles_and_back(digits, mae_scale, tmp_path):
    recipe = arguments(digits, "schedule.stop_after_steps=2")
    done = mae_scale("pretrain", "demo", "--out", tmp_path / "square", *OFF, *recipe)
    assert done.returncode == 0, done.stderr
    start, grids = tmp_path / "square", [(4, 4)]
    for size in ("[16,64]", "[32,64]", "32"):  # the first has as many patches as the square
        out = tmp_path / f"at {size}"
        command = ["finetune", "finetune/demo", "--weights", start, "--out", out, *OFF]
        probe = ["classifier.trained_blocks=0", "optim.layer_decay=1", "schedule.epochs=2"]
        done = mae_scale(*command, *few(digits, *probe, f"model.image_size={size}"))
        assert done.returncode == 0, done.stderr
        before, after = (model_of(folder).encoder.pos_embed for folder in (start, out))
        grids.append(model_of(out).encoder.grid)
        old, new = grids[-2:]
        maps = before[1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(maps, new, mode="bicubic").permute(0, 2, 3, 1).flatten(0, 2)
        assert torch.equal(after[1:], expected)
        start = out
    assert grids == [(4, 4), (2, 8), (4, 8), (4, 4)]


def model_of(run: Path) -> Classifier:
    model, _ = checkpoint_model(list_checkpoints(run / "checkpoints")[-1][1])
    return model


def test_neighbours_features_and_reconstructions(pretrained, digits, mae_scale, tmp_path):
    own = few(digits, WIDE)
    figure = ["--figure", tmp_path / "near.png"]
    done = mae_scale("knn", "probe/demo", "--weights", pretrained, *own, *figure, "--json", tmp_path / "knn.json")
    assert done.returncode == 0, done.stderr
    assert 10 < json.loads((tmp_path / "knn.json").read_text())["top1"] < 100
    features = ["--out", tmp_path / "f.safetensors", "--kind", "patch", f"data.root={digits}/val"]
    sizes = [word for word in own if word.startswith("model.")]
    done = mae_scale("features", "demo", "--weights", pretrained, *features, *sizes)
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "f.safetensors")["features"].shape == (355, 32, 32)
    done = mae_scale("features", "demo", "--weights", pretrained, *features, *sizes, "model.image_size=32")
    assert done.returncode == 2
    assert "images of 32 x 64 px" in done.stderr
    assert "add model.image_size=[32,64]" in done.stderr
    words = ["--weights", pretrained, "--out", tmp_path / "r.png", f"data.val_root={digits}/val"]
    done = mae_scale("reconstruct", "demo", *words)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.width > 8 * 256


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("pretrain/beit_demo", ["model.target=normalised_pixels", "tokeniser=null"]),
        ("pretrain/moco_v3_vit_base", ["model.name=null", "moco.hidden=64", "moco.dim=32", "engine.precision=null"]),
    ],
)
def test_beit_and_moco_v3_are_pre_trained_and_fine_tuned(recipe, more, digits, mae_scale, tmp_path):
    own = [word for word in arguments(digits, WIDE, *more) if "decoder" not in word]
    measures = ["tracking.knn_images=100", "schedule.stop_after_steps=12", "checkpoint.every_steps=6"]
    done = mae_scale("pretrain", recipe, "--out", tmp_path / "run", "--nproc", 2, *OFF, *own, *measures)
    assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert np.isfinite([row["train/loss"] for row in rows]).all()
    assert len(rows) == 12
    encoder = package.load_encoder(tmp_path / "run")
    assert encoder.image_size == (32, 64)
    beit = ["model.encoder=beit", "model.layer_scale=0.1"] if "beit" in recipe else []
    command = ["finetune", "finetune/demo", "--weights", tmp_path / "run", *OFF, "model.image_size=[64,32]", *beit]
    done = mae_scale(*command, "--out", tmp_path / "tuned", *few(digits))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[224]", "model.image_size=[224]: expected pixels per side, such as 224, or [height, width]"),
        ("[0,16]", "model.image_size=[0, 16]: expected pixels per side"),
        ("a", "model.image_size='a': expected pixels per side"),
        ("[224,225]", "image_size 225 px is not a multiple of patch_size 4 px: the nearest that fits is 224"),
        ("[224,a]", "model.image_size=[224, 'a']: expected pixels per side"),
    ],
)
@pytest.mark.parametrize("command", [["pretrain", "demo"], ["finetune", "scratch/demo"]])
def test_other_forms_are_refused_in_one_line(command, value, says, call, digits, tmp_path):
    data = [f"data.root={digits}/train", f"data.val_root={digits}/val", "model.patch_size=4"]
    code, _, said = call(*command, "--out", tmp_path / "run", *OFF, *data, f"model.image_size={value}")
    assert (code, said.count("\n"), says in said) == (2, 1, True), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pretrain", "pretrain/dvae_demo", "--out", "run"], "task: dvae takes square images only; use one number"),
        (
            ["pretrain", "demo", "--out", "run", "model.target=tokens"],
            "words (model.target=tokens) are found in square",
        ),
        (
            ["tokens", "pretrain/beit_demo", "--out", "t", "--tokeniser", "t", "model.target=pixels", "tokeniser=null"],
            "model.image_size=[32,64]: only square images are taken here; use one number, such as 64",
        ),
    ],
)
def test_what_takes_squares_only_says_so(words, says, call, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").mkdir()
    code, _, said = call(*words, WIDE, f"data.root={digits}/train")
    assert (code, said.count("\n"), says in said) == (2, 1, True), said


def test_a_pair_of_equal_sides_is_the_square(call):
    square, pair = (call("recipes", "show", "demo", f"model.image_size={size}") for size in ("48", "[48,48]"))
    assert square == pair
    assert square[0] == 0
