"""MoCo v3 as a user runs it: two views of digits through DALI, killed, resumed, on other ranks, and what it leaves."""

import json
import math

import mlflow
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import mae_scale as package
from mae_scale.checkpoints.export import checkpoint_model
from mae_scale.checkpoints.shards import MOMENTUM
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.config.load import load_recipe
from mae_scale.models.weights.files import read_weights
from mae_scale.tasks.registry import task_of
from mae_scale.tracking.metrics_log import read_metrics
from tests.faults.harness import Training, kill_after, newest_whole_step
from tests.tiny import losses, stored

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SIZE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
TINY = [
    *(f"model.{key}={value}" for key, value in SIZE.items()),
    "model.name=null",
    "moco.hidden=64",
    "moco.dim=32",
    "moco.momentum=0.9",  # at which two dozen steps move the average
    "data.global_batch=120",
    "data.threads=1",
    "engine.precision=null",
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "optim.base_lr=2e-3",
    "tracking.log_every_steps=1",
    "tracking.evaluate_every_epochs=1",
    "checkpoint.every_steps=2",
]
STEPS = 2 * (1442 // 120)


@pytest.fixture(scope="module")
def command(digits):
    """Arguments of a tiny run of two ranks."""
    data = [f"data.root={digits}/train", f"data.val_root={digits}/val", "tracking.knn_images=200"]
    return ["pretrain", "pretrain/moco_v3_vit_base", *data, *TINY]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, mae_scale, command):
    """An uninterrupted run of two ranks, tracked in MLflow; its folder and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = mae_scale(*command, "--nproc", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def averages(out) -> dict[str, torch.Tensor]:
    """The momentum encoder's average in a run's newest checkpoint, by the parameter's name."""
    return stored(list_checkpoints(out / "checkpoints")[-1][1], MOMENTUM)


UNDETERMINED = ("attn.qkv.bias", "encoder.norm.bias")
"""Biases of keys, and before a BatchNorm: their gradients are rounding, of which AdamW makes whole steps."""


def distance(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of parameters with the same names, but for those that rounding decides."""
    assert some.keys() == others.keys()
    names = [name for name in others if not name.endswith(UNDETERMINED)]
    return sum((some[name] - others[name]).double().square().sum().item() for name in names) ** 0.5


@pytest.fixture(scope="module")
def ways(whole) -> dict[str, float]:
    """Distances of the uninterrupted run: of its average and its weights from the initial ones, and of the two."""
    recipe = load_recipe(str(whole[0] / "recipe.yaml"))
    torch.manual_seed(recipe.seed)
    objective = task_of(recipe, whole[0]).build(None)
    initial = {name: parameter.detach().flatten() for name, parameter in objective.named_parameters()}
    average, last = averages(whole[0]), stored(list_checkpoints(whole[0] / "checkpoints")[-1][1], "weight")
    return {"average": distance(average, initial), "weights": distance(last, initial), "lag": distance(average, last)}


@pytest.fixture(scope="module")
def near(ways) -> float:
    """A distance that is small beside the way that the average has come."""
    return 1e-4 * ways["average"]


def test_the_average_has_left_the_initial_weights_and_lags_behind_the_last_ones(ways):
    assert ways["average"] > 0.2 * ways["weights"]
    assert ways["lag"] > 0.2 * ways["weights"]


def test_the_average_hardly_moves_in_the_last_steps_when_its_momentum_is_nearly_one(whole, ways):
    before, last = (stored(folder, MOMENTUM) for _, folder in list_checkpoints(whole[0] / "checkpoints")[-2:])
    assert 0 < distance(last, before) < 0.01 * ways["lag"]


def test_a_run_logs_every_step_learns_and_measures_k_nn(whole):
    out, said = whole
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["train/loss"] == pytest.approx(4 * 0.2 * math.log(120), rel=0.1)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    measured = {row["step"]: row["val/knn_top1"] for row in rows if "val/knn_top1" in row}
    assert list(measured) == [STEPS // 2, STEPS]
    assert measured[STEPS] > 30  # percent, of ten classes
    assert "Traceback" not in said


def test_one_rank_and_another_engine_give_the_same_curve_and_momentum_encoder(
    whole, near, command, mae_scale, tmp_path
):
    out = tmp_path / "run"
    other = ["engine.backend=fairscale", "engine.zero_stage=1", "--tracking-uri", "off"]
    done = mae_scale(*command, *other, "--out", out)
    assert done.returncode == 0, done.stderr
    mine, theirs = losses(out), losses(whole[0])
    assert max(abs(mine[step] - theirs[step]) for step in theirs) < 1e-4
    assert distance(averages(out), averages(whole[0])) < near


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_run_that_is_killed_goes_on_to_the_same_curve_and_momentum_encoder(ranks, whole, near, command, tmp_path):
    out = tmp_path / "run"
    quiet = ["--tracking-uri", "off"]
    kill_after(out, 4, *command, *quiet, "--nproc", 2)
    assert newest_whole_step(out) < STEPS
    with Training(out, *command, *quiet, "--nproc", ranks, log="again") as training:
        assert training.wait() == 0, training.text()
    assert "going on from step" in training.text()
    mine, theirs = losses(out), losses(whole[0])
    found, expected = averages(out), averages(whole[0])
    if ranks == 2:
        assert mine == theirs
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    else:
        assert max(abs(mine[step] - theirs[step]) for step in theirs) < 1e-4
        assert distance(found, expected) < near


def test_the_encoder_is_left_for_timm_load_encoder_and_mlflow(whole, monkeypatch):
    out, _ = whole
    model, _ = checkpoint_model(list_checkpoints(out / "checkpoints")[-1][1])
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.features(images)
    encoder = VisionTransformer(32, 8, num_classes=0, global_pool="token", embed_dim=32, depth=2, num_heads=2).eval()
    encoder.load_state_dict(read_weights(out / "export" / "model.safetensors"))
    for norm in (encoder.norm, *(norm for block in encoder.blocks for norm in (block.norm1, block.norm2))):
        norm.eps = 1e-6
    loaded = package.load_encoder(out)
    from_file = package.load_encoder(out / "export" / "model.safetensors", heads=2)
    run = json.loads((out / "export" / "mlflow_model.json").read_text())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run["uri"])
    served = mlflow.pytorch.load_model(run["model_uri"])
    pixels = images.permute(0, 2, 3, 1) * served.std + served.mean
    with torch.no_grad():
        for found in (encoder(images), loaded(images), from_file(images), served(pixels)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["run", "run/export/model.safetensors", "official.pth"])
def test_its_encoder_is_fine_tuned_probed_and_trained_in_part(start, whole, digits, mae_scale, call, tmp_path):
    weights = tmp_path / start if start == "official.pth" else whole[0].parent / start
    if start == "official.pth":
        assert call("export", whole[0], weights)[0] == 0
    size = [f"model.{key}={value}" for key, value in SIZE.items()]
    data = [f"data.root={digits}/train", f"data.val_root={digits}/val", *size, "schedule.epochs=2"]
    data += ["schedule.warmup_epochs=1", "data.global_batch=24", "classifier.pool=cls", "--tracking-uri", "off"]
    for verb, recipe in (("finetune", "finetune/demo"), ("finetune", "partial/demo"), ("probe", "probe/demo")):
        out = tmp_path / recipe
        more = ["classifier.trained_blocks=1"] if recipe.startswith("partial") else []
        done = mae_scale(verb, recipe, "--weights", weights, "--out", out, *data, *more)
        assert done.returncode == 0, done.stderr
        assert (out / "export" / "model.safetensors").exists()


@pytest.mark.parametrize("layout", ["official", "timm", "hf", "safetensors"])
def test_a_checkpoint_is_exported_in_every_layout(layout, whole, call, tmp_path):
    code, _, error = call("export", whole[0], tmp_path / "w.safetensors", "--format", layout)
    assert code == 0, error
    assert len(read_weights(tmp_path / "w.safetensors")) > 20
    if layout in ("timm", "hf"):
        code, _, error = call("export", whole[0], tmp_path / "folder", "--format", layout)
        assert code == 0, error
