"""A password in the tracking URI is used, and stands in no file, no parameter, no log and no list of processes."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.faults.harness import Training
from tests.tiny import arguments, losses

pytestmark = pytest.mark.timeout(400)

PASSWORD = "Tr0ub4dor&3"
ENCODED = "Tr0ub4dor%263"


def holding(folder: Path) -> list[Path]:
    """Files below a folder in which the password stands."""
    words = [PASSWORD.encode(), ENCODED.encode(), b"Tr0ub4dor"]
    return [path for path in folder.rglob("*") if path.is_file() and any(word in path.read_bytes() for word in words)]


def test_a_password_stands_nowhere_and_comes_from_the_command_or_the_environment_at_each_start(
    server, digits, tmp_path
):
    out = tmp_path / "runs" / "r"
    whole = server.uri.replace("http://", f"http://me:{ENCODED}@")
    quick = ["engine.backend=fairscale", "engine.zero_stage=1", "schedule.stop_after_steps=2"]
    recipe = [*arguments(digits, *quick), "tracking.experiment=passwords"]
    with Training(out, "pretrain", "demo", "--nproc", 2, "--tracking-uri", whole, *recipe) as training:
        ranks = training.wait_until(lambda: len(found := training.ranks()) == 2 and found)
        seen = [" ".join(rank.cmdline()) for rank in ranks.values()]
        assert training.wait() == 0, training.text()
    assert all("--tracking-uri http://me@127" in words and "Tr0ub4dor" not in words for words in seen), seen
    client = MlflowClient(server.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("passwords").experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 2
    assert run.data.params["tracking.uri"] == server.uri.replace("http://", "http://me@")
    assert "recipe.yaml" in [file.path for file in client.list_artifacts(run.info.run_id)]
    assert f"uri: {server.uri.replace('http://', 'http://me@')}\n" in (out / "recipe.yaml").read_text()

    # The stored recipe goes on, its password from the environment.
    go_on = ["pretrain", out / "recipe.yaml", "schedule.stop_after_steps=3"]
    with Training(out, *go_on, MLFLOW_TRACKING_URI=whole) as training:
        assert training.wait() == 0, training.text()
    assert list(losses(out)) == [1, 2, 3]
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 3
    assert len(list(out.rglob("manifest.json"))) == 2
    assert holding(tmp_path) == []  # the run's folder and all that it has printed
    assert holding(server.folder) == []  # MLflow's database and the artifacts


@pytest.mark.slow  # the start waits for MLflow at its end
def test_a_password_of_a_database_stays_out_of_the_log_when_nobody_answers(digits, mae_scale, tmp_path):
    uri = "postgresql://127.0.0.1:1/db?user=me&password=Tr0ub4dor"
    quick = ["engine.backend=fairscale", "engine.zero_stage=1", "schedule.stop_after_steps=1"]
    done = mae_scale("pretrain", "demo", "--out", tmp_path / "r", *arguments(digits, *quick), f"tracking.uri={uri}")
    assert done.returncode == 0, done.stderr
    assert "MLflow (postgresql://127.0.0.1:1/db?user=me&password=***)" in done.stdout + done.stderr
    assert "Tr0ub4dor" not in done.stdout + done.stderr
    assert holding(tmp_path) == []
