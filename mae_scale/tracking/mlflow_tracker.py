"""MLflow, filled in from metrics.jsonl by a thread of rank 0: never during a step, nothing lost or twice.

metrics.jsonl is the truth. On every (re)connection the thread asks the server which steps of which metric it has, and
sends the others; this covers a request that was accepted but whose answer was lost, and a resumed run that logs steps
again which an earlier start had sent. A request that was given up and arrives late carries the same key, step, time
and value, which are one entry in MLflow's SQL store.
"""

from __future__ import annotations

import getpass
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UsageError
from mae_scale.passwords import redacted, without_password
from mae_scale.tracking.metrics_log import parse_rows, read_metrics
from mae_scale.tracking.mlflow_artifacts import send_artifact
from mae_scale.tracking.mlflow_environment import quieten_loggers, reason, set_environment
from mae_scale.tracking.mlflow_names import allowed_name, name_in_mlflow
from mae_scale.tracking.mlflow_page import RunPage, complete_page
from mae_scale.tracking.mlflow_state import MlflowState
from mae_scale.tracking.mlflow_uri import artifact_location
from mae_scale.tracking.sqlite_database import new_sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

METRICS_PER_REQUEST = 1000  # MLflow's own limit, as are the lengths below
PARAM_LENGTH, TAG_LENGTH = 6000, 5000
RUN_KEY_TAG = "mae_scale.run_key"
FIRST_WAIT_S, LONGEST_WAIT_S, CLOSING_WAIT_S = 1.0, 30.0, 0.5


@dataclass(frozen=True)
class _Connection:
    """A client that has answered, and the run that it found or made."""

    client: MlflowClient
    run_id: str


class MlflowTracker:
    """The MLflow run of a training run, continued by the id in `out_dir`/mlflow.json. Rank 0 makes one.

    A daemon thread does all requests; `notify` and `log_artifact` return at once. A server that is slow, down or gone
    costs one warning; what it missed is sent when it answers again, in this start or a later one.
    """

    def __init__(
        self,
        out_dir: Path,
        *,
        uri: str,
        experiment: str,
        run_name: str | None,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        page: RunPage | None = None,
    ):
        """Import mlflow, which takes seconds, and start the thread; do not wait for the server.

        `params`: the flattened recipe; the first start's values stay, a later, other value becomes the tag param.KEY.
        `tags`: of this start; None is left out. `run_name`: by default the folder's name. Raises UsageError when
        mlflow is not installed.
        """
        if util.find_spec("mlflow") is None:
            raise UsageError("tracking needs mlflow: pip install mlflow, or switch it off with tracking.uri=off")
        set_environment()
        import mlflow  # noqa: F401  (here and not in the thread: an import beside other imports can fail)

        quieten_loggers()
        self.uri = uri
        self._out_dir = Path(out_dir).absolute()
        self._out_dir.mkdir(parents=True, exist_ok=True)
        self._log_path = self._out_dir / "metrics.jsonl"
        self._run_name, self._page = run_name or self._out_dir.name, page
        said = {key: str(value) for key, value in params.items() if str(value)}
        self._params = {allowed_name(key): redacted(value)[:PARAM_LENGTH] for key, value in said.items()}
        given = {key: str(value) for key, value in tags.items() if value is not None}
        self._tags = {allowed_name(key): redacted(value)[:TAG_LENGTH] for key, value in given.items()}
        self._started_at = time.time()
        self._state = MlflowState(self._out_dir)
        self._state.update(uri=without_password(uri), experiment=experiment)

        self._connection: _Connection | None = None
        self._delivered: dict[str, set[int]] = defaultdict(set)  # metric name -> steps that MLflow has
        self._log_inode: int | None = None
        self._log_offset = 0
        self._final_status: str | None = None
        self._has_new_tags = False
        self._wake, self._closing, self._abandoned, self._answered = (threading.Event() for _ in range(4))
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """ID of the MLflow run; None until the server has answered for the first time."""
        return self._state.run_id

    def wait_for_run(self, timeout_s: float) -> str | None:
        """Return the MLflow run's id once the server has answered in this start; None after `timeout_s`."""
        return self.run_id if self._answered.wait(timeout_s) else None

    def notify(self) -> None:
        """Wake the thread for a new row of metrics.jsonl."""
        self._wake.set()

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag of the run; a later start does not know it."""
        self._tags[allowed_name(name)] = redacted(value)[:TAG_LENGTH]
        self._has_new_tags = True
        self._wake.set()

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Queue a file for the run's folder `artifact_path`; its content is read when its turn comes.

        A file that is still queued when the run ends is sent by its next start.
        """
        self._send_later(path, artifact_path=artifact_path)

    def log_figure(self, path: Path, figure: str, step: int) -> None:
        """Queue a picture as a step of `figure`; a step that MLflow has already stays as it is there."""
        self._send_later(path, figure=figure, step=step)

    def _send_later(self, path: Path, **how: Any) -> None:
        path = Path(path).absolute()
        if path.is_relative_to(self._out_dir):
            path = path.relative_to(self._out_dir)
        self._state.add_artifact({"path": str(path), **how})
        self._wake.set()

    def close(self, status: str = "FINISHED", timeout_s: float = 20.0) -> None:
        """Deliver the rest, set the run's status (FINISHED, FAILED or KILLED) and stop, within `timeout_s`.

        When that time is not enough, one warning says how much is undelivered and how to deliver it.
        """
        if self._closing.is_set():
            return
        self._final_status = status
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            return
        self._abandoned.set()
        rows = sum(1 for row in read_metrics(self._log_path) if self._missing(row))
        files = len(self._state.artifacts)
        logger.warning(
            f"MLflow ({redacted(self.uri)}) did not take everything within {timeout_s:g} s: {rows} logged steps and "
            f"{files} files wait in {self._out_dir}, and running the same command again delivers them"
        )

    # The thread.

    def _work(self) -> None:
        failures, down, filled_in = 0, False, 0
        wait_s: float | None = None
        while not self._abandoned.is_set():
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                connection = self._connection or self._connect()
                filled_in += self._send_rows(connection)
                self._send_tags(connection)
                if down:
                    where = redacted(self.uri)
                    logger.info("MLflow (%s) is back; %d logged steps filled in", where, filled_in)
                failures, down, filled_in = 0, False, 0
            except Exception as error:
                # The first failure may be a dropped connection or a deleted run, which connecting anew mends.
                failures += 1
                self._connection = None
                if failures > 1:
                    if not down:
                        logger.warning(
                            "MLflow (%s) does not take metrics: %s. The run goes on; they wait in %s",
                            redacted(self.uri),
                            reason(error),
                            self._log_path,
                        )
                    down = True
                    self._pause(min(FIRST_WAIT_S * 2 ** (failures - 2), LONGEST_WAIT_S))
                continue
            artifacts_left = self._send_artifacts(connection, quietly=wait_s is not None)
            wait_s = min(2 * (wait_s or FIRST_WAIT_S), LONGEST_WAIT_S) if artifacts_left else None
            if not closing:
                self._wake.wait(wait_s)
            elif self._end_run(connection) and not artifacts_left:
                return
            else:
                self._pause(CLOSING_WAIT_S)

    def _pause(self, seconds: float) -> None:
        if self._closing.is_set():
            self._abandoned.wait(CLOSING_WAIT_S)
        else:
            self._closing.wait(seconds)

    def _connect(self) -> _Connection:
        """Find or make the run, update its parameters and tags, and ask which steps it has."""
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        new_sqlite_file(self.uri, MlflowClient)
        client = MlflowClient(self.uri)
        run = self._known_run(client) or self._new_run(client)
        run_id = run.info.run_id
        if run_id != self._state.run_id:
            self._state.update(run_id=run_id)
        if run.info.status != "RUNNING":
            client.update_run(run_id, "RUNNING")
        first = run.data.params
        others = {
            allowed_name(f"param.{key}"): value[:TAG_LENGTH]
            for key, value in self._params.items()
            if key in first and (value != first[key] or f"param.{key}" in run.data.tags)
        }
        client.log_batch(
            run_id,
            params=[Param(key, value) for key, value in self._params.items() if key not in first],
            tags=[RunTag(key, value) for key, value in (self._tags | others).items()],
        )
        if self._page is not None:
            self._complete_page(client, run, self._page)
        delivered: dict[str, set[int]] = defaultdict(set)
        for name in run.data.metrics:
            delivered[name].update(metric.step for metric in client.get_metric_history(run_id, name))
        self._delivered = delivered
        self._log_offset = 0
        self._connection = _Connection(client, run_id)
        self._answered.set()
        return self._connection

    def _complete_page(self, client: MlflowClient, run: Run, page: RunPage) -> None:
        """Give the run its description and data sets; a server that does not take them costs a warning, no metrics."""
        from mlflow import MlflowException

        try:
            complete_page(client, run, page)
        except MlflowException as error:
            if error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"):  # such as a lost connection
                raise
            self._page = None
            logger.warning("MLflow (%s) does not take the run's description: %s", redacted(self.uri), reason(error))

    def _known_run(self, client: MlflowClient) -> Run | None:
        """Return the run of mlflow.json, or one that a request without an answer has made, or None."""
        from mlflow import MlflowException

        run_id = self._state.run_id
        if run_id is not None:
            try:
                run = client.get_run(run_id)
                if run.info.lifecycle_stage == "active":
                    return run
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment = client.get_experiment_by_name(self._state.experiment)
        if experiment is None:
            return None
        where = f"tags.`{RUN_KEY_TAG}` = '{self._state.key}'"
        found = client.search_runs([experiment.experiment_id], where, max_results=1)
        return found[0] if found else None

    def _new_run(self, client: MlflowClient) -> Run:
        """Make a run, and its experiment where there is none; warn when it replaces a lost one."""
        if self._state.run_id is not None:
            logger.warning(
                "MLflow (%s) no longer has run %s of %s; a new run takes its place, with all logged steps",
                redacted(self.uri),
                self._state.run_id,
                self._out_dir / "mlflow.json",
            )
        name = self._state.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is not None and experiment.lifecycle_stage != "active":
            raise RuntimeError(f"experiment {name!r} is deleted there; restore it or set tracking.experiment")
        if experiment is None:
            # Two runs may make it at once: the second is refused, connects anew and finds it.
            experiment_id = client.create_experiment(name, artifact_location(self.uri, self._out_dir))
        else:
            experiment_id = experiment.experiment_id
        rows = read_metrics(self._log_path)
        return client.create_run(
            experiment_id,
            start_time=int(1000 * (rows[0]["time"] if rows else self._started_at)),
            tags={RUN_KEY_TAG: self._state.key, "mlflow.user": _user(), "mlflow.source.name": "mae-scale"},
            run_name=self._run_name,
        )

    def _send_rows(self, connection: _Connection) -> int:
        """Send the rows of metrics.jsonl that MLflow lacks, whole rows per request; return their number."""
        from mlflow.entities import Metric

        batch: list[Metric] = []
        rows_sent = 0

        def send() -> None:
            connection.client.log_batch(connection.run_id, metrics=batch)
            for metric in batch:
                self._delivered[metric.key].add(metric.step)
            batch.clear()

        for row in self._new_rows():
            missing = self._missing(row)
            if batch and len(batch) + len(missing) > METRICS_PER_REQUEST:
                send()
            time_ms = int(1000 * row["time"])
            batch.extend(Metric(name, value, time_ms, row["step"]) for name, value in missing.items())
            rows_sent += bool(missing)
        if batch:
            send()
        return rows_sent

    def _send_tags(self, connection: _Connection) -> None:
        """Send the tags that were set since connecting."""
        from mlflow.entities import RunTag

        if self._has_new_tags:
            self._has_new_tags = False
            connection.client.log_batch(connection.run_id, tags=[RunTag(*tag) for tag in dict(self._tags).items()])

    def _missing(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Return the row's metrics, with the epoch, that MLflow is not known to have at its step."""
        step = row["step"]
        return {
            name_in_mlflow(name): float(value)
            for name, value in row.items()
            if name not in ("step", "time") and isinstance(value, int | float)
            if step not in self._delivered.get(name_in_mlflow(name), ())
        }

    def _new_rows(self) -> list[dict[str, Any]]:
        """Return the rows since the last call; all of them after connecting, or when the file was replaced."""
        try:
            with open(self._log_path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._log_inode or status.st_size < self._log_offset:
                    self._log_inode, self._log_offset = status.st_ino, 0
                file.seek(self._log_offset)
                content = file.read()
        except FileNotFoundError:
            return []
        self._log_offset += content.rfind(b"\n") + 1
        return [row for _, row in parse_rows(content) if row is not None]

    def _send_artifacts(self, connection: _Connection, *, quietly: bool) -> bool:
        """Send the queued files, in order; return whether some are left because sending failed."""
        while self._state.artifacts:
            entry = self._state.artifacts[0]
            path = self._out_dir / entry["path"]
            try:
                if path.exists():
                    send_artifact(connection.client, connection.run_id, path, entry)
                else:
                    logger.warning("%s is no longer there, so MLflow does not get it", path)
            except Exception as error:
                if not quietly:
                    where = redacted(self.uri)
                    logger.warning("MLflow (%s) does not take %s yet: %s", where, path, reason(error))
                return True
            self._state.drop_artifact()
        return False

    def _end_run(self, connection: _Connection) -> bool:
        """Set the run's final status; return whether MLflow took it."""
        try:
            connection.client.set_terminated(connection.run_id, self._final_status)
        except Exception:
            self._connection = None
            return False
        return True


def _user() -> str:
    """Return the user's name, else the user's id."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return str(os.getuid())
