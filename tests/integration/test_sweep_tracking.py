"""Sweeps and a real `mlflow server`: it goes away in the middle, a name is taken, runs are deleted."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.integration.mlflow_server import Server
from tests.tiny import STEPS, arguments


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


def sweep_of(digits, server, out, values="0.5,0.75", *more) -> list:
    words = ["sweep", "demo", f"model.mask_ratio={values}", "--out", out]
    return [*words, *arguments(digits, f"tracking.uri={server.uri}", *more)]


def runs_of(server) -> dict:
    """{name: run} of all runs that are not deleted."""
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("mae-scale").experiment_id
    return {run.info.run_name.partition(",")[0]: run for run in client.search_runs([experiment])}


def rows_of(client, run_id: str, table: str, folder) -> list[str]:
    """The first cell of each row of a table that MLflow has."""
    path = Path(client.download_artifacts(run_id, table, folder))
    return [row[0] for row in json.loads(path.read_text())["data"]]


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_what_a_server_misses_while_it_is_down_it_gets_from_the_same_command(server, tmp_path, digits, mae_scale):
    out, client = tmp_path / "ratios", MlflowClient(server.uri)
    first = mae_scale(*sweep_of(digits, server, out, "0.5,0.75"))
    assert first.returncode == 0, first.stderr
    server.kill()
    down = mae_scale(*sweep_of(digits, server, out, "0.5,0.75,0.9"))
    assert down.returncode == 0, down.stderr
    assert down.stderr.count("does not take the sweep ratios: Connection refused") == 1
    assert "0.9         1/1" in down.stdout
    server.start()
    gone = runs_of(server)["mask_ratio-0.75_seed-0"].info.run_id
    client.delete_run(gone)
    again = mae_scale(*sweep_of(digits, server, out, "0.5,0.75,0.9"))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("MLflow gets what it lacks") == 2
    runs = runs_of(server)
    parent = runs.pop("ratios")
    assert set(runs) == {f"mask_ratio-{ratio}_seed-0" for ratio in (0.5, 0.75, 0.9)}
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == "FINISHED"
        assert len(client.get_metric_history(run.info.run_id, "train/loss")) == STEPS
    assert "| 0.9 | 1/1 |" in parent.data.tags["mlflow.note.content"]
    assert rows_of(client, parent.info.run_id, "results_table.json", tmp_path) == ["0.5", "0.75", "0.9"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_name_that_another_sweep_has_is_refused_with_the_way_out(server, tmp_path, digits, mae_scale):
    one = tmp_path / "a" / "ratios"
    assert mae_scale(*sweep_of(digits, server, one, "0.5,0.75")).returncode == 0
    moved = tmp_path / "moved"
    shutil.move(one, moved)
    other = mae_scale(*sweep_of(digits, server, one, "0.6,0.7"))
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert f"has a sweep 'ratios' already, of {one}; give this one a --name of its own" in other.stderr
    assert not list(one.glob("*/events.jsonl"))
    goes_on = mae_scale(*sweep_of(digits, server, moved, "0.5,0.75"), "--name", "ratios")
    assert goes_on.returncode == 0, goes_on.stderr
    assert goes_on.stdout.count("done already") == 2


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_throughput_sweep_has_a_parent_and_a_deleted_point_is_measured_anew(server, tmp_path, digits, mae_scale):
    out, client = tmp_path / "weak", MlflowClient(server.uri)
    words = ["scaling", "run", "demo", "--out", out, "--steps", 10, "--ranks", "1,2"]
    words += arguments(digits, f"tracking.uri={server.uri}")
    done = mae_scale(*words)
    assert done.returncode == 0, done.stderr
    runs = runs_of(server)
    assert set(runs) == {"weak", "ranks_0001", "ranks_0002"}
    parent = runs["weak"]
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in ("ranks_0001", "ranks_0002")} == {parent.info.run_id}
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {
        "throughput.png",
        "throughput_table.json",
    }
    assert parent.info.status == "FINISHED"
    client.delete_run(runs["ranks_0002"].info.run_id)
    kept = (out / "ranks_0001" / "metrics.jsonl").read_bytes()
    again = mae_scale(*words)
    assert again.returncode == 0, again.stderr
    assert f"{out}/ranks_0002: its run was deleted in MLflow, so it is measured anew" in again.stdout
    assert f"{out}/ranks_0001: measured already" in again.stdout
    assert (out / "ranks_0001" / "metrics.jsonl").read_bytes() == kept
    assert runs_of(server)["ranks_0002"].info.run_id != runs["ranks_0002"].info.run_id
    client.delete_run(parent.info.run_id)
    reported = mae_scale("scaling", "report", out)
    assert reported.returncode == 0, reported.stderr
    runs = runs_of(server)
    new_parent = runs["weak"].info.run_id
    assert rows_of(client, new_parent, "throughput_table.json", tmp_path) == ["ranks_0001", "ranks_0002"]
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in ("ranks_0001", "ranks_0002")} == {new_parent}
