"""A fine-tuned classifier in MLflow: logged once, by a server that may be down, and served by MLflow alone."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from data_pipeline.batch_order import EvaluationOrder
from data_pipeline.index_build import open_index
from data_pipeline.loader import ImageLoader
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from mae_scale import load_encoder as mae_scale_encoder
from mae_scale.checkpoints.export import checkpoint_model
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.models.classifier import build_classifier
from mae_scale.tracking import mlflow_models
from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.tracking.mlflow_models import ServedClassifier, log_model
from mae_scale.tracking.mlflow_state import mlflow_run_of
from tests.integration.mlflow_server import Server, wait_for
from tests.loaders import on_cpu
from tests.tiny import STEPS, arguments

NAME = "digits"
TINY = [
    "classifier.from_scratch=true",
    "classifier.mixup=0",
    "classifier.cutmix=0",
    "data.augmentation=random_resized_crop",
    "data.flip=0",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "model.drop_path=0",
    "optim.layer_decay=1",
    "optim.base_lr=2e-2",
    "schedule.epochs=15",
    "schedule.warmup_epochs=1",
    "checkpoint.every_epochs=15",
]


@pytest.fixture(scope="module")
def finetune(digits, mae_scale):
    """Call the tiny fine-tuning; each call is the same command for the same folder and server."""

    def run(out: Path, server: Server, *more: str) -> str:
        data = [f"data.root={digits}/train", f"data.val_root={digits}/val"]
        done = mae_scale("finetune", "finetune/demo", "--out", out, "--tracking-uri", server.uri, *data, *TINY, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def run(server, finetune, tmp_path_factory):
    """A finished run, its note on the model, and what it said."""
    out = tmp_path_factory.mktemp("runs") / "run"
    said = finetune(out, server, f"tracking.registered_model={NAME}")
    return SimpleNamespace(out=out, said=said, note=note_of(out), client=MlflowClient(server.uri))


@pytest.fixture(autouse=True)
def _tracking_uri(server, monkeypatch):
    """Of what these tests load from MLflow; the run has it from its command alone."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)


def note_of(out: Path) -> dict:
    return json.loads((out / "export" / "mlflow_model.json").read_text())


def models_of(client: MlflowClient, run_id: str) -> list:
    experiment_id = client.get_run(run_id).info.experiment_id
    return list(client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'"))


@pytest.fixture(scope="module")
def pixels(digits) -> np.ndarray:
    """Images of the validation folder as they lie there: float32 [20, 32, 32, 3]."""
    files = sorted((digits / "val").glob("*/*.jpg"))[::18]
    return np.stack([np.asarray(Image.open(file).convert("RGB"), np.float32) for file in files])


@pytest.fixture(scope="module")
def expected(run, pixels) -> np.ndarray:
    """What the newest checkpoint's model says of them."""
    model, _ = checkpoint_model(list_checkpoints(run.out / "checkpoints")[-1][1])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        probabilities = model((((torch.tensor(pixels) / 255) - mean) / std).permute(0, 3, 1, 2)).softmax(1)
    assert probabilities.std(0).max() > 0.02, "the model says the same of all images"
    return probabilities.numpy()


@pytest.mark.slow
def test_loaded_model_gives_the_probabilities_of_the_checkpoint(run, pixels, expected):
    loaded = mlflow.pytorch.load_model(run.note["model_uri"])
    with torch.inference_mode():
        np.testing.assert_allclose(loaded(torch.tensor(pixels)).numpy(), expected, atol=1e-5)
    as_function = mlflow.pyfunc.load_model(f"models:/{NAME}/1")
    np.testing.assert_allclose(as_function.predict(pixels), expected, atol=1e-5)


@pytest.mark.slow
def test_model_has_signature_a_real_image_class_names_and_what_it_needs(run, digits, tmp_path):
    info = mlflow.models.get_model_info(run.note["model_uri"])
    (inputs,), (outputs,) = info.signature.inputs.inputs, info.signature.outputs.inputs
    assert (inputs.shape, inputs.type) == ((-1, 32, 32, 3), np.float32)
    assert (outputs.shape, outputs.type) == ((-1, 10), np.float32)
    assert info.metadata["class_names"] == [str(digit) for digit in range(10)]
    example = np.asarray(mlflow.pyfunc.load_model(run.note["model_uri"]).input_example)
    assert example.shape == (1, 32, 32, 3)
    index = open_index(digits / "val", progress=False)
    with ImageLoader(index, EvaluationOrder(len(index)), on_cpu(kind="evaluation")) as loader:
        real = next(iter(loader)).images.permute(0, 2, 3, 1).numpy()
    real = 255 * (real * np.float32([0.229, 0.224, 0.225]) + np.float32([0.485, 0.456, 0.406]))
    assert np.abs(real - example).max(axis=(1, 2, 3)).min() < 0.51
    files = Path(mlflow.artifacts.download_artifacts(run.note["model_uri"], dst_path=str(tmp_path)))
    requirements = (files / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} == {"mae-scale", "torch", "mlflow"}


@pytest.mark.slow
def test_model_and_pictures_are_of_the_run_and_the_name_has_version_one(run):
    run_id = run.note["run_id"]
    assert run_id == json.loads((run.out / "mlflow.json").read_text())["run_id"]
    assert [model.model_uri for model in models_of(run.client, run_id)] == [run.note["model_uri"]]
    assert [output.model_id for output in run.client.get_run(run_id).outputs.model_outputs] == [
        run.note["model_uri"].removeprefix("models:/")
    ]
    version = run.client.get_model_version(NAME, "1")
    assert (version.run_id, version.status, run.note["version"]) == (run_id, "READY", "1")
    pictures = {file.path for file in run.client.list_artifacts(run_id, "figures")}
    assert pictures == {"figures/loss_curve.png", "figures/attention.png", "figures/per_class.png"}
    for picture in pictures:
        with Image.open(run.out / picture) as png:
            assert min(png.size) > 300
    assert "warning" not in run.said


@pytest.mark.slow
def test_the_same_command_again_logs_nothing_twice_whether_it_knows_or_asks(run, server, finetune):
    for _ in range(2):
        assert "warning" not in finetune(run.out, server, f"tracking.registered_model={NAME}")
        assert len(models_of(run.client, run.note["run_id"])) == 1
        assert len(run.client.search_model_versions(f"name = '{NAME}'")) == 1
        assert note_of(run.out) == run.note
        (run.out / "export" / "mlflow_model.json").unlink()
    (run.out / "export" / "mlflow_model.json").write_text(json.dumps(run.note))


@pytest.mark.slow
def test_served_model_answers_an_image_with_its_probabilities(run, pixels, expected, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}/1", "--env-manager", "local"]
    with open(tmp_path / "serve.log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "serve.log").read_text()
        try:
            return urllib.request.urlopen(f"{url}/ping", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_for(answers, "the served model to answer")
        body = json.dumps({"inputs": pixels[:2].astype(int).tolist()}).encode()
        request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            found = json.loads(answer.read())["predictions"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
    np.testing.assert_allclose(found, expected[:2], atol=1e-5)


@pytest.mark.slow
def test_server_that_is_down_costs_a_warning_and_the_same_command_logs_later(finetune, tmp_path):
    late = Server(tmp_path)
    out = tmp_path / "run"
    said = finetune(out, late, "tracking.registered_model=late")
    assert f"MLflow ({late.uri}) did not take the model late" in said
    assert "running the same command again logs it" in said
    assert (out / "export" / "model.safetensors").exists()
    assert not (out / "export" / "mlflow_model.json").exists()
    try:
        late.start()
        assert "warning" not in finetune(out, late, "tracking.registered_model=late")
        client = MlflowClient(late.uri)
        assert client.get_model_version("late", "1").run_id == note_of(out)["run_id"]
        assert len(models_of(client, note_of(out)["run_id"])) == 1
    finally:
        late.kill()


@pytest.fixture
def given(server, tmp_path):
    """A classifier and what `log_model` takes beside it, for a run of MLflow's that has no model yet."""
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("without training")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("without training")
    return {
        "model": ServedClassifier(build_classifier(classes=2, image_size=8, patch_size=4, width=8, depth=1, heads=1)),
        "uri": server.uri,
        "run_id": client.create_run(experiment_id).info.run_id,
        "example": np.zeros((1, 8, 8, 3), np.float32),
        "metadata": {"class_names": ["no", "yes"]},
        "scratch": tmp_path,
    }


def test_a_model_that_was_cut_off_half_way_is_completed_and_takes_a_name_later(server, given, tmp_path):
    client, run_id = MlflowClient(server.uri), given["run_id"]
    begun = client.create_logged_model(client.get_run(run_id).info.experiment_id, "classifier", source_run_id=run_id)
    logged = log_model(**given, registered_name=None)
    assert logged == {"model_uri": f"models:/{begun.model_id}", "version": None}
    (ready,) = models_of(client, run_id)
    assert (ready.model_id, str(ready.status)) == (begun.model_id, "READY")
    assert log_model(**given, registered_name="half") == logged | {"version": "1"}
    assert mlflow.pytorch.load_model("models:/half/1")(torch.zeros(1, 8, 8, 3)).shape == (1, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_large_model_gives_the_server_time_to_store_it(given, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    monkeypatch.setattr(mlflow_models, "SLOWEST_UPLOAD_BYTES_PER_S", 100)
    seen = []
    upload = MlflowClient.log_model_artifacts

    def watched(client, model_id, folder):
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        seen.append((int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]), 15 + size // 100))
        upload(client, model_id, folder)

    monkeypatch.setattr(MlflowClient, "log_model_artifacts", watched)
    log_model(**given, registered_name=None)
    assert seen[0][0] == pytest.approx(seen[0][1], abs=1)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "15"


def test_what_the_note_says_is_logged_asks_no_server(tmp_path):
    note = {"uri": "http://nobody", "run_id": "1", "registered_name": "a", "model_uri": "models:/m-1", "version": "1"}
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mlflow_model.json").write_text(json.dumps(note))
    asked = []
    tracker = SimpleNamespace(uri="http://nobody", run_id="1", wait_for_run=lambda timeout_s: asked.append(timeout_s))

    def keep(name):
        mlflow_models.keep_model(
            tracker, tmp_path, lambda: pytest.fail("not needed"), metadata={}, registered_name=name
        )

    keep("a")
    keep(None)
    assert asked == []
    keep("b")
    assert len(asked) == 1
    tracker.run_id = "2"
    keep("a")
    assert len(asked) == 2


def test_a_pre_trained_encoder_is_a_model_of_its_run_with_the_runs_last_metrics(
    server, tmp_path, digits, mae_scale, pixels
):
    out = tmp_path / "pretrained"
    done = mae_scale("pretrain", "demo", "--out", out, "--tracking-uri", server.uri, *arguments(digits))
    assert done.returncode == 0, done.stderr
    client, last = MlflowClient(server.uri), read_metrics(out / "metrics.jsonl")[-1]
    (logged,) = models_of(client, mlflow_run_of(out))
    assert (logged.name, str(logged.status)) == ("encoder", "READY")
    found = {metric.key: metric.value for metric in logged.metrics}
    assert {name: found[name] for name in ("train/loss", "val/loss")} == {
        name: pytest.approx(last[name], rel=1e-6) for name in ("train/loss", "val/loss")
    }
    assert len(client.get_metric_history(mlflow_run_of(out), "train/loss")) == STEPS
    with torch.inference_mode():
        features = mlflow.pytorch.load_model(logged.model_uri)(torch.tensor(pixels))
        encoder = mae_scale_encoder(out)
        images = (torch.tensor(pixels) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
        expected = encoder.forward_features(images.permute(0, 3, 1, 2))[:, 1:].mean(1)
    assert features == pytest.approx(expected, abs=1e-5)
