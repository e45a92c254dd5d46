"""BEiT and the tokeniser in MLflow, in an SQLite beside the runs: each logged step once, and BEiT's encoder, served."""

import json

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from mae_scale.checkpoints.export import checkpoint_model
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.tracking.metrics_log import read_metrics
from tests.tiny import STEPS, STEPS_PER_EPOCH, arguments
from tests.tokenisers import pixels_of, tokeniser_file

pytestmark = pytest.mark.slow

WORDS = 32


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def train(digits, mae_scale, runs):
    """Pre-train on the digits in two starts, tracked where the recipe says; the run's folder."""

    def run(name, *words):
        sizes = [word for word in arguments(digits, *words) if "decoder" not in word]
        command = [
            "pretrain",
            f"pretrain/{name}_demo",
            "--out",
            runs / name,
            *sizes,
            "tracking.evaluate_every_epochs=1",
        ]
        for stop in (["schedule.stop_after_steps=5"], []):
            done = mae_scale(*command, *stop)
            assert done.returncode == 0, done.stderr
        return runs / name

    return run


@pytest.fixture(scope="module")
def beit(train, digits, runs):
    tokeniser = tokeniser_file(runs / "tokeniser.safetensors", digits, WORDS)
    return train("beit", "model.target=tokens", f"tokeniser.weights={tokeniser}", "tracking.knn_images=100")


@pytest.fixture(scope="module")
def dvae(train):
    return train("dvae", "tokeniser.width=8", "tokeniser.words=16")


def logged(out):
    """{metric: [(step, value)]} of a run, as MLflow has it, of losses and what is measured."""
    client = MlflowClient(f"sqlite:///{out.parent / 'mlflow.db'}")
    run_id = json.loads((out / "mlflow.json").read_text())["run_id"]
    assert client.get_run(run_id).info.status == "FINISHED"
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith(("train/", "val/"))]
    return {name: sorted((m.step, m.value) for m in client.get_metric_history(run_id, name)) for name in names}


@pytest.mark.parametrize(
    ("method", "measured"),
    [
        ("beit", {"val/loss", "val/knn_top1"}),
        ("dvae", {"val/loss", "val/mse", "val/words_used", "val/perplexity"}),
    ],
)
def test_a_run_of_two_starts_has_each_step_and_each_measurement_once(method, measured, request):
    out = request.getfixturevalue(method)
    found, rows = logged(out), read_metrics(out / "metrics.jsonl")
    assert [step for step, _ in found["train/loss"]] == list(range(1, STEPS + 1))
    assert {name for name in found if name.startswith("val/")} == measured
    for name in measured:
        assert [step for step, _ in found[name]] == [STEPS_PER_EPOCH, STEPS]
    assert found == {name: [(row["step"], row[name]) for row in rows if name in row] for name in found}


def test_beits_served_encoder_gives_the_features_of_the_checkpoint(beit, digits, monkeypatch):
    note = json.loads((beit / "export" / "mlflow_model.json").read_text())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", note["uri"])
    served = mlflow.pytorch.load_model(note["model_uri"])
    model, _ = checkpoint_model(list_checkpoints(beit / "checkpoints")[-1][1])
    pixels = pixels_of(digits).permute(0, 2, 3, 1)
    images = (pixels - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    with torch.no_grad():
        expected = model.features(images.permute(0, 3, 1, 2))[:, 1:].mean(dim=1)
        found = served(255 * pixels)
    assert expected.std(dim=0).max() > 0.01  # not the same for all images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
