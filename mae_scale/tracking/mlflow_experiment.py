"""The runs of an MLflow experiment, read for people: parameters, tags, newest values, histories."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipeline.errors import UsageError
from mae_scale.passwords import redacted
from mae_scale.tracking.mlflow_environment import quieten_loggers, reason, set_environment
from mae_scale.tracking.mlflow_names import name_in_metrics_log, name_in_mlflow
from mae_scale.tracking.mlflow_uri import sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

REQUESTS_AT_ONCE = 4
PARENT_TAG = "mlflow.parentRunId"


@dataclass(frozen=True)
class TrackedRun:
    """A run as MLflow has it."""

    name: str
    run_id: str
    status: str
    """RUNNING, FINISHED, FAILED, KILLED or SCHEDULED."""
    params: dict[str, str]
    tags: dict[str, str]
    values: dict[str, float]
    """The newest value of each metric, by its name in metrics.jsonl, where it is finite."""
    duration_s: float | None
    histories: dict[str, list[tuple[int, float]]]
    """(step, value) of metrics, by step, by their names in metrics.jsonl; empty where they were not asked for."""


def read_experiment(uri: str, name: str, metrics: Sequence[str], *, histories_of: int, most: int) -> list[TrackedRun]:
    """Return the runs of an experiment, the newest first, without parents that have no metric of their own.

    metrics: by their names in metrics.jsonl; their histories are read of the newest `histories_of` runs, a request for
    each. most: of more runs than these UsageError is raised, and so it is when MLflow does not answer or has no such
    experiment.
    """
    database = sqlite_path(uri)
    if database is not None and not database.is_file():
        raise UsageError(f"MLflow's database {database} does not exist; give --tracking-uri of the one with the runs")
    set_environment()
    from mlflow import MlflowClient

    quieten_loggers()
    try:
        client = MlflowClient(uri)
        runs = _runs_of(client, uri, name, most)
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            histories = pool.map(lambda run: _histories(client, run, metrics), runs[:histories_of])
            found = dict(zip((run.info.run_id for run in runs), histories, strict=False))
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"MLflow ({redacted(uri)}) cannot be read: {reason(error)}") from None
    return [_tracked(run, found.get(run.info.run_id, {})) for run in runs]


def _runs_of(client: MlflowClient, uri: str, name: str, most: int) -> list[Run]:
    """Return the experiment's runs, the newest first."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = sorted(one.name for one in client.search_experiments(max_results=20))
        raise UsageError(
            f"{name} is neither a folder nor an experiment of MLflow ({redacted(uri)}), which has {', '.join(known)}"
        )
    runs: list[Run] = []
    token = None
    while len(runs) <= most and (token is not None or not runs):
        page = client.search_runs(
            [experiment.experiment_id], max_results=1000, page_token=token, order_by=["attributes.start_time DESC"]
        )
        runs += page
        token = page.token
        if not page:
            break
    parents = {run.data.tags.get(PARENT_TAG) for run in runs}
    runs = [run for run in runs if run.info.run_id not in parents or "train/loss" in run.data.metrics]
    if not runs:
        raise UsageError(f"experiment {name} of MLflow ({redacted(uri)}) has no run yet")
    if len(runs) > most:
        raise UsageError(f"experiment {name} has more than {most:,} runs, too many for one page; report on folders")
    return runs


def _histories(client: MlflowClient, run: Run, metrics: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """Return the histories of the metrics that a run has; of a step that was logged twice the later value."""
    found = {}
    for metric in metrics:
        name = name_in_mlflow(metric)
        if name in run.data.metrics:
            history = client.get_metric_history(run.info.run_id, name)
            by_step = {one.step: one.value for one in sorted(history, key=lambda one: one.timestamp)}
            found[metric] = sorted(by_step.items())
    return found


def _tracked(run: Run, histories: dict[str, list[tuple[int, float]]]) -> TrackedRun:
    info, data = run.info, run.data
    seconds = (info.end_time - info.start_time) / 1000 if info.end_time and info.start_time else None
    return TrackedRun(
        name=info.run_name or info.run_id,
        run_id=info.run_id,
        status=info.status,
        params=dict(data.params),
        tags=dict(data.tags),
        values={name_in_metrics_log(name): value for name, value in data.metrics.items() if math.isfinite(value)},
        duration_s=seconds,
        histories=histories,
    )
