"""A real MLflow server that comes late, dies, loses answers and comes back: no step lost, none twice."""

import http.client
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline.errors import UsageError
from mae_scale.tracking import mlflow_tracker
from mae_scale.tracking.metrics_log import MetricsLog
from mae_scale.tracking.mlflow_page import Images, RunPage
from mae_scale.tracking.mlflow_tracker import MlflowTracker
from mae_scale.tracking.mlflow_uri import tracking_uri
from tests.integration.mlflow_server import DEADLINE_S, wait_for

pytestmark = pytest.mark.timeout(120)
EXPERIMENT = "pre-training"


class LossyProxy(ThreadingHTTPServer):
    """Passes requests on to a server; hangs up where `loses(path)` says "request" or "answer"."""

    daemon_threads = True

    def __init__(self, port: int, loses):
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target_port, self.loses = port, loses
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Forward(BaseHTTPRequestHandler):
    def _forward(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        lost = self.server.loses(self.path)
        if lost == "request":
            self._hang_up()
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target_port, timeout=20)
        connection.request(self.command, self.path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if lost == "answer":
            self._hang_up()
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward

    def log_message(self, *arguments):
        pass


class Run:
    """A training run's side of tracking: rows into metrics.jsonl, each noticed to the tracker, and timed."""

    def __init__(self, out_dir: Path, uri: str, *, resume_step: int = 0, params=None, tags=None, page=None):
        self.log = MetricsLog(out_dir / "metrics.jsonl", resume_step)
        self.times_s: list[float] = []
        self.tracker = MlflowTracker(
            out_dir, uri=uri, experiment=EXPERIMENT, run_name=None, params=params or {}, tags=tags or {}, page=page
        )

    def log_steps(self, steps, pause_s: float = 0.0) -> None:
        for step in steps:
            started = time.perf_counter()
            self.log.append(step, step / 10, {"train/loss": 1 / step, "train/lr": 1e-4, "perf/mfu": 0.4})
            self.tracker.notify()
            self.times_s.append(time.perf_counter() - started)
            time.sleep(pause_s)


def steps_in_mlflow(client, run_id: str) -> dict[str, list[int]]:
    """For each metric the steps that MLflow holds, as often as it holds them."""
    names = client.get_run(run_id).data.metrics
    return {name: sorted(m.step for m in client.get_metric_history(run_id, name)) for name in names}


def each_once(last_step: int) -> dict[str, list[int]]:
    names = ("epoch", "train/loss", "train/lr", "mfu")
    return {name: list(range(1, last_step + 1)) for name in names}


def runs_of(client) -> list:
    return client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])


@pytest.fixture(autouse=True, scope="module")
def _fast_retries():
    before = mlflow_tracker.FIRST_WAIT_S, mlflow_tracker.LONGEST_WAIT_S
    mlflow_tracker.FIRST_WAIT_S, mlflow_tracker.LONGEST_WAIT_S = 0.1, 0.5
    yield
    mlflow_tracker.FIRST_WAIT_S, mlflow_tracker.LONGEST_WAIT_S = before


@pytest.fixture(scope="module")
def client(server):
    from mlflow import MlflowClient

    return MlflowClient(server.uri)


@pytest.fixture(scope="module")
def outage(server, tmp_path_factory):
    """The server hangs, is gone, is back: a run goes through it, one starts in it, one ends in it."""
    folder = tmp_path_factory.mktemp("outage")
    through = Run(folder / "through", server.uri)
    through.log_steps(range(1, 11))
    wait_for(lambda: through.tracker.run_id, "the first run")
    end = [threading.Timer(0.3, server.hang), threading.Timer(1.5, server.kill)]
    for timer in end:
        timer.start()
    through.log_steps(range(11, 301), pause_s=0.006)
    for timer in end:
        timer.join()
    started_in_it = Run(folder / "started", server.uri)
    ended_in_it = Run(folder / "ended", server.uri)
    started_in_it.log_steps(range(1, 31))
    ended_in_it.log_steps(range(1, 31))
    closing = time.monotonic()
    ended_in_it.tracker.close(timeout_s=1)
    close_s = time.monotonic() - closing
    ended_in_it.log.close()
    through.log_steps(range(301, 321))
    server.start()
    through.log_steps(range(321, 331))
    for run in (through, started_in_it):
        run.tracker.close(timeout_s=DEADLINE_S)
    return SimpleNamespace(
        folder=folder, through=through, started_in_it=started_in_it, ended_in_it=ended_in_it, close_s=close_s
    )


def test_parameters_tags_step_metrics_and_figures_arrive(server, client, tmp_path):
    figure = tmp_path / "run" / "figures" / "reconstruction.png"
    run = Run(
        tmp_path / "run",
        server.uri,
        params={"model.depth": 12, "optim.betas": [0.9, 0.95], "tracking.uri": "http://me:secret@host"},
        tags={"git_commit": "abc", "world_size": 2, "slurm_job_id": None},
    )
    run.log_steps(range(1, 6))
    run.log.append(6, 0.6, {"train/loss": float("nan"), "train/lr": 0.0, "perf/mfu": 0.4})
    figure.parent.mkdir()
    figure.write_bytes(b"picture")
    run.tracker.log_artifact(figure, "figures")
    run.tracker.close()
    stored = client.get_run(run.tracker.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "run"
    assert stored.data.params == {
        "model.depth": "12",
        "optim.betas": "[0.9, 0.95]",
        "tracking.uri": "http://me:***@host",
    }
    assert stored.data.tags["git_commit"] == "abc"
    assert stored.data.tags["world_size"] == "2"
    assert "slurm_job_id" not in stored.data.tags
    assert steps_in_mlflow(client, run.tracker.run_id) == each_once(6)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loss = client.get_metric_history(run.tracker.run_id, "train/loss")
    assert [(m.step, m.value, m.timestamp) for m in loss if m.step < 6] == [
        (row["step"], row["train/loss"], int(1000 * row["time"])) for row in rows[:5]
    ]
    downloaded = client.download_artifacts(run.tracker.run_id, "figures/reconstruction.png", str(tmp_path))
    assert Path(downloaded).read_bytes() == b"picture"


def test_a_run_has_a_description_and_its_images_once_and_what_a_user_has_written_stays(server, client, tmp_path):
    images = tuple(Images("digits/" + role, "ab" * 16, "/data", role, 100, 10) for role in ("training", "validation"))
    page = RunPage("a name", "**pretrain**, on http://me:secret@host", images)
    for note in ("written by a user", None):
        run = Run(tmp_path / "run", server.uri, page=page)
        run_id = run.tracker.wait_for_run(DEADLINE_S)
        stored = client.get_run(run_id)
        if note is not None:
            assert stored.data.tags["mlflow.note.content"] == "**pretrain**, on http://me:***@host"
            client.set_tag(run_id, "mlflow.note.content", note)
        run.tracker.close()
        run.log.close()
    assert client.get_run(run_id).data.tags["mlflow.note.content"] == "written by a user"
    found = [(one.dataset.name, one.dataset.digest, one.tags[0].value) for one in stored.inputs.dataset_inputs]
    assert sorted(found) == [("digits/" + role, "ab" * 16, role) for role in ("training", "validation")]


def test_server_that_is_down_at_the_start_gets_every_step_later(outage, client):
    assert steps_in_mlflow(client, outage.started_in_it.tracker.run_id) == each_once(30)


def test_server_killed_in_the_middle_has_every_step_once(outage, client):
    assert steps_in_mlflow(client, outage.through.tracker.run_id) == each_once(330)
    assert client.get_run(outage.through.tracker.run_id).info.status == "FINISHED"


def test_logging_a_step_never_waits_for_the_server(outage):
    for run in (outage.through, outage.started_in_it):
        times_s = sorted(run.times_s)
        assert times_s[int(0.99 * len(times_s)) - 1] < 0.05
        assert times_s[-1] < 0.5  # a busy machine, but no request: those take 15 s to give up
    assert outage.close_s < 2


def test_run_that_ended_in_an_outage_is_completed_by_the_next_start(outage, server, client):
    assert outage.ended_in_it.tracker.run_id is None
    again = Run(outage.folder / "ended", server.uri, resume_step=30)
    again.tracker.close()
    assert steps_in_mlflow(client, again.tracker.run_id) == each_once(30)
    assert client.get_run(again.tracker.run_id).info.status == "FINISHED"


def test_resume_at_an_earlier_step_continues_the_run_without_a_step_twice(server, client, tmp_path):
    first = Run(tmp_path, server.uri, params={"engine.zero_stage": 1, "seed": 0})
    first.log_steps(range(1, 21, 2))  # logs every second step, then dies after step 19
    first.tracker.close("KILLED")
    second = Run(tmp_path, server.uri, resume_step=10, params={"engine.zero_stage": 2, "seed": 0})
    second.log_steps(range(11, 31))
    second.tracker.close()
    assert second.tracker.run_id == first.tracker.run_id
    run = client.get_run(second.tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"engine.zero_stage": "1", "seed": "0"}
    assert run.data.tags["param.engine.zero_stage"] == "2"
    expected = [*range(1, 10, 2), *range(11, 31)]
    assert steps_in_mlflow(client, run.info.run_id) == dict.fromkeys(each_once(1), expected)


def test_lost_requests_and_answers_leave_one_run_and_every_step_once(server, client, tmp_path):
    still_to_lose = {"runs/create": ["answer"], "runs/log-batch": ["answer", "request"] * 3}

    def loses(path: str) -> str | None:
        for end, what in still_to_lose.items():
            if path.endswith(end) and what:
                return what.pop()
        return None

    runs_before = len(runs_of(client)) if client.get_experiment_by_name(EXPERIMENT) else 0
    proxy = LossyProxy(server.port, loses)
    try:
        run = Run(tmp_path, proxy.uri)
        last_step = 0
        while left := len(still_to_lose["runs/log-batch"]):
            run.log_steps(range(last_step + 1, last_step + 11))
            last_step += 10
            wait_for(lambda left=left: len(still_to_lose["runs/log-batch"]) < left, "something lost")
        run.tracker.close(timeout_s=DEADLINE_S)
    finally:
        proxy.shutdown()
        proxy.server_close()
    assert not any(still_to_lose.values())
    assert steps_in_mlflow(client, run.tracker.run_id) == each_once(last_step)
    assert len(runs_of(client)) == runs_before + 1


def test_row_sent_twice_is_stored_once(server, client):
    """What the answer-less request rests on: MLflow's store knows a metric by key, step, time and value."""
    from mlflow.entities import Metric

    experiment = client.get_experiment_by_name("twice")
    run_id = client.create_run(experiment.experiment_id if experiment else client.create_experiment("twice"))
    row = [Metric("loss", 0.1 + 0.2, 1700000000123, 5), Metric("bad", float("nan"), 1700000000123, 5)]
    for metrics in (row, row, [*row, Metric("lr", 1e-4, 1700000000123, 5)]):
        client.log_batch(run_id.info.run_id, metrics=metrics)
    assert steps_in_mlflow(client, run_id.info.run_id) == {"loss": [5], "bad": [5], "lr": [5]}


def test_run_deleted_on_the_server_is_replaced_and_filled_again(server, client, tmp_path, caplog):
    first = Run(tmp_path, server.uri)
    first.log_steps(range(1, 11))
    first.tracker.close("KILLED")
    client.delete_run(first.tracker.run_id)
    second = Run(tmp_path, server.uri, resume_step=10)
    second.log_steps(range(11, 16))
    second.tracker.close()
    assert second.tracker.run_id != first.tracker.run_id
    assert first.tracker.run_id in caplog.text
    assert steps_in_mlflow(client, second.tracker.run_id) == each_once(15)


def test_outage_is_one_warning_and_what_is_undelivered_is_sent_by_the_next_start(server, client, tmp_path, caplog):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # not listening: refused
        run = Run(tmp_path, f"http://127.0.0.1:{nobody.getsockname()[1]}")
        run.log_steps(range(1, 8))
        picture = tmp_path / "loss.png"
        picture.write_bytes(b"curve")
        run.tracker.log_artifact(picture)
        time.sleep(1.5)
        run.tracker.close(timeout_s=0.5)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([text for text in warnings if "does not take metrics" in text]) == 1
    assert len([text for text in warnings if "7 logged steps and 1 files" in text]) == 1
    assert len(warnings) == 2
    again = Run(tmp_path, server.uri, resume_step=7)
    again.tracker.close()
    assert steps_in_mlflow(client, again.tracker.run_id) == each_once(7)
    assert [file.path for file in client.list_artifacts(again.tracker.run_id)] == ["loss.png"]


def test_default_is_sqlite_beside_the_run_and_leaves_the_working_folder_clean(tmp_path, monkeypatch, capfd, caplog):
    from mlflow import MlflowClient

    work, out_dir = tmp_path / "work", tmp_path / "runs" / "first"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = tracking_uri(None, out_dir)
    assert uri == f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    run = Run(out_dir, uri)
    run.log_steps(range(1, 101))
    run.tracker.log_artifact(out_dir / "metrics.jsonl")
    run.tracker.close(timeout_s=DEADLINE_S)
    assert sorted(run.times_s)[-2] < 0.05
    client = MlflowClient(uri)
    assert steps_in_mlflow(client, run.tracker.run_id) == each_once(100)
    assert (tmp_path / "runs" / "mlartifacts" / run.tracker.run_id / "artifacts" / "metrics.jsonl").exists()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "first",
        "mlartifacts",
        "mlflow.db",
    ]
    assert list(work.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_missing_mlflow_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_tracker.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install mlflow"):
        MlflowTracker(tmp_path, uri="http://127.0.0.1:1", experiment="x", run_name=None, params={}, tags={})
