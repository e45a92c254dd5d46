"""What is measured after a training has ended, in its MLflow run on a real server."""

import logging
import re

import pytest
from mlflow import MlflowClient

from mae_scale.reproduce import digits as digits_demo
from mae_scale.reproduce import digits_transfer
from mae_scale.tracking.finished_run import add_artifact, add_metrics
from mae_scale.tracking.mlflow_state import mlflow_run_of
from tests.tiny import STEPS, TINY, arguments


@pytest.fixture(scope="module")
def trained(server, digits, tmp_path_factory, mae_scale):
    """A run that has ended."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = mae_scale("pretrain", "demo", "--out", out, *arguments(digits, f"tracking.uri={server.uri}"))
    assert done.returncode == 0, done.stderr
    return out


def history(server, out, name) -> list[tuple[int, float]]:
    found = MlflowClient(server.uri).get_metric_history(mlflow_run_of(out), name)
    return [(metric.step, metric.value) for metric in found]


@pytest.mark.slow
def test_a_metric_is_sent_once_at_the_last_step_and_leaves_the_run_ended(server, trained):
    for value in (91.5, 91.5, 92.25, 92.25):
        add_metrics(trained, server.uri, {"probe/top1": value, "probe/top1_random_weights": 79.1})
    assert history(server, trained, "probe/top1") == [(STEPS, 91.5), (STEPS, 92.25)]
    assert history(server, trained, "probe/top1_random_weights") == [(STEPS, 79.1)]
    run = MlflowClient(server.uri).get_run(mlflow_run_of(trained))
    assert run.data.metrics["probe/top1"] == 92.25
    assert run.info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("http://127.0.0.1:9", "(http://127.0.0.1:9) did not take probe/top1 for {out}: Connection refused"),
        ("sqlite:///{out}/none.db", "FileNotFoundError: {out}/none.db does not exist"),
    ],
)
def test_a_store_that_does_not_answer_costs_one_warning(trained, uri, why, caplog):
    add_metrics(trained, uri.format(out=trained), {"probe/top1": 1.0})
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert why.format(out=trained) in caplog.text
    assert not (trained / "none.db").exists()


def test_nothing_is_sent_for_a_training_without_tracking_and_a_run_that_mlflow_lacks_is_said(tmp_path, caplog):
    add_metrics(tmp_path, "http://127.0.0.1:9", {"probe/top1": 1.0})
    add_metrics(tmp_path, "off", {"probe/top1": 1.0})
    assert not caplog.records
    (tmp_path / "mlflow.json").write_text('{"run_id": null}')
    add_artifact(tmp_path, "http://127.0.0.1:9", tmp_path / "mlflow.json", "figures")
    assert "has no run of" in caplog.text


@pytest.mark.slow
def test_the_demo_puts_its_two_accuracies_into_its_run_once(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digits_demo, "RANKS", 1)
    for _ in range(2):
        digits_demo.run_demo(tmp_path, 0, [*TINY, f"tracking.uri={server.uri}"])
    printed = re.findall(r"(0\.\d+) (?:with random weights|after pre-training)", capsys.readouterr().out)
    assert printed[:2] == printed[2:]
    for name, accuracy in zip(("probe/top1_random_weights", "probe/top1"), printed, strict=False):
        [(step, percent)] = history(server, tmp_path / "run-seed0", name)
        assert (step, f"{percent / 100:.3f}") == (STEPS, accuracy)


@pytest.mark.slow
def test_the_transfer_demo_puts_each_ways_accuracy_into_the_pre_trainings_run(server, tmp_path, monkeypatch):
    """The ways of transfer are not trained here; each has a figure."""
    top1 = {way.name: 50.0 + number for number, way in enumerate((*digits_transfer.WAYS, digits_transfer.DOUBLE))}
    monkeypatch.setattr(digits_transfer, "_top1", lambda way, *_, **__: top1[way.name])
    monkeypatch.setattr(digits_transfer, "partial_curve", lambda *_: None)
    for _ in range(2):
        digits_transfer.run_transfer(tmp_path, seeds=(0,), overrides=(*TINY, f"tracking.uri={server.uri}"))
    for name, value in top1.items():
        assert history(server, tmp_path / "run-seed0", f"transfer/top1_{name}") == [(STEPS, value)]
