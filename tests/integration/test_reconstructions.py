"""Pictures of a run while it trains: from validation images, under any engine, and each step of them once in MLflow."""

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from mae_scale.tracking.mlflow_artifacts import steps_of_figure
from tests.integration.mlflow_server import DEADLINE_S
from tests.integration.test_mlflow import Run
from tests.tiny import arguments, losses

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def client(server):
    return MlflowClient(server.uri)


@pytest.fixture
def greys(tmp_path) -> Path:
    """Twenty validation images in one grey."""
    for number in range(20):
        place = tmp_path / "greys" / "any" / f"{number:02d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (200, 200, 200)).save(place)
    return tmp_path / "greys"


@pytest.mark.slow
def test_zero_3_draws_validation_images_into_a_real_server_and_trains_as_without(
    digits, greys, mae_scale, server, client, tmp_path
):
    """On two ranks that hold a part of the weights each, with checkpointed activations and two micro-batches."""
    few = [f"data.root={digits}/val", "data.global_batch=24"]  # 14 steps per epoch
    same = arguments(digits, *few, f"data.val_root={greys}", "engine.zero_stage=3", "engine.micro_batch=12")
    for out, every, uri in (("often", 1, server.uri), ("once", 1000, "off")):
        command = ["pretrain", "demo", "--nproc", 2, "--out", tmp_path / out, "--tracking-uri", uri]
        done = mae_scale(*command, *same, f"tracking.reconstruct_every_epochs={every}", timeout=290)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "often") == losses(tmp_path / "once")
    run_id = json.loads((tmp_path / "often" / "mlflow.json").read_text())["run_id"]
    assert steps_of_figure(client, run_id, "reconstructions") == [14, 28]
    assert client.get_run(run_id).data.tags["mlflow.loggedImages"] == "True"
    folders = [tmp_path / out / "figures" / "reconstructions" for out in ("often", "once")]
    assert [[file.name for file in sorted(folder.iterdir())] for folder in folders] == [
        ["step_00000014.png", "step_00000028.png"],
        ["step_00000028.png"],
    ]
    first, last, once = (
        np.asarray(Image.open(file).convert("RGB")) for folder in folders for file in sorted(folder.iterdir())
    )
    assert np.array_equal(last, once)
    assert not np.array_equal(first, last)
    assert np.abs(first[50:165, 160:270].astype(int) - 200).max() <= 2  # the first original


def test_a_step_of_a_figure_is_in_mlflow_once_though_it_is_sent_again(server, client, tmp_path):
    """By a start that was killed when MLflow had the picture, or that has drawn the step again."""
    picture = tmp_path / "run" / "step.png"
    picture.parent.mkdir()
    Image.new("RGB", (64, 48)).save(picture)
    first = Run(picture.parent, server.uri)
    for step in (5, 12):
        first.tracker.log_figure(picture, "reconstructions", step)
    first.tracker.close(timeout_s=DEADLINE_S)
    state = json.loads((picture.parent / "mlflow.json").read_text())
    assert state["artifacts"] == []
    state["artifacts"] = [{"path": "step.png", "figure": "reconstructions", "step": step} for step in (5, 12)]
    (picture.parent / "mlflow.json").write_text(json.dumps(state))
    again = Run(picture.parent, server.uri)
    for step in (12, 24):
        again.tracker.log_figure(picture, "reconstructions", step)
    again.tracker.close(timeout_s=DEADLINE_S)
    assert steps_of_figure(client, again.tracker.run_id, "reconstructions") == [5, 12, 24]


def test_a_picture_that_cannot_be_written_is_a_warning(digits, mae_scale, tmp_path):
    (tmp_path / "r" / "figures").mkdir(parents=True)
    (tmp_path / "r" / "figures" / "reconstructions").write_text("in the way")
    recipe = arguments(digits, "schedule.stop_after_steps=1")
    done = mae_scale("pretrain", "demo", "--out", tmp_path / "r", "--tracking-uri", "off", *recipe, timeout=290)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step_00000001.png could not be drawn (FileExistsError") == 1
    assert (tmp_path / "r" / "figures" / "loss_curve.png").exists()
