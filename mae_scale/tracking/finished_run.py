"""Files and metrics for the MLflow run of a training that has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mae_scale.passwords import redacted
from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.tracking.mlflow_environment import quieten_loggers, reason, set_environment
from mae_scale.tracking.mlflow_state import mlflow_run_of
from mae_scale.tracking.mlflow_uri import sqlite_path, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)


def add_artifact(out: Path, uri: str, path: Path, folder: str) -> None:
    """Send a file into the folder `folder` of the MLflow run of the training in `out`; warn when that fails.

    Does nothing for a training that was not tracked.
    """
    _send(out, uri, str(path), lambda client, run_id: client.log_artifact(run_id, str(path), folder))


def add_metrics(out: Path, uri: str | None, metrics: Mapping[str, float]) -> None:
    """Send metrics to the MLflow run of the training in `out`, at its last step; warn when that fails.

    `uri` as in the recipe. What the run has already is not sent again. Does nothing for a training that was not
    tracked.
    """
    found = tracking_uri(uri, out)
    if found is not None:
        _send(out, found, ", ".join(metrics), lambda client, run_id: _log_missing(client, run_id, out, metrics))


def _log_missing(client: MlflowClient, run_id: str, out: Path, metrics: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    rows = read_metrics(out / "metrics.jsonl")
    step, now_ms = rows[-1]["step"] if rows else 0, int(1000 * time.time())
    known = client.get_run(run_id).data.metrics
    missing = [Metric(name, value, now_ms, step) for name, value in metrics.items() if known.get(name) != value]
    if missing:
        client.log_batch(run_id, metrics=missing)


def _send(out: Path, uri: str, what: str, action: Callable[[MlflowClient, str], None]) -> None:
    """Call `action` with a client and the id of the MLflow run of the training in `out`, if it has one."""
    run_id = mlflow_run_of(out)
    if run_id is None:
        if (out / "mlflow.json").is_file():
            logger.warning("MLflow (%s) has no run of %s yet, which would get %s", redacted(uri), out, what)
        return
    set_environment()
    from mlflow import MlflowClient

    quieten_loggers()
    try:
        database = sqlite_path(uri)
        if database is not None and not database.is_file():  # MLflow would make an empty one
            raise FileNotFoundError(f"{database} does not exist")
        action(MlflowClient(uri), run_id)
    except Exception as error:
        logger.warning("MLflow (%s) did not take %s for %s: %s", redacted(uri), what, out, reason(error))
