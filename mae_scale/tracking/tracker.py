"""Rank 0's reports of a run: on the terminal, in metrics.jsonl and to MLflow. The other ranks report nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mae_scale.config.schema import Recipe
from mae_scale.tracking.console import Console, NullConsole
from mae_scale.tracking.metrics_log import MetricsLog
from mae_scale.tracking.mlflow_page import RunPage
from mae_scale.tracking.mlflow_tracker import MlflowTracker
from mae_scale.tracking.mlflow_uri import tracking_uri
from mae_scale.tracking.output import Output


@dataclass(frozen=True)
class RunFacts:
    """Facts that a start reports once."""

    start: int
    """Number of updates already done."""
    total_steps: int
    """The step after which this start ends."""
    steps_per_epoch: int
    used: Mapping[str, Any]
    """Values that this start has decided itself, by the recipe's key."""
    tags: Mapping[str, Any]
    """Tags of the MLflow run; None is left out."""
    page: RunPage | None
    """On rank 0."""
    planned: Mapping[str, float]
    """Metrics for the first row of the start: what it is planned to take."""


class Tracker:
    """Logger of a run, as a context manager; it does nothing unless `speaks`, which is True on rank 0 only."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        facts: RunFacts,
        *,
        speaks: bool,
        output: Output,
        guard: Callable[[], None] | None,
    ):
        """guard: called before a step is logged; it ends a process that may no longer write."""
        self._log: MetricsLog | None = None
        self._guard = guard
        self._planned = facts.planned
        self.mlflow: MlflowTracker | None = None  # rank 0's, unless tracking is off
        self.console = NullConsole()
        if not speaks:
            return
        self.console = Console(
            facts.total_steps,
            steps_per_epoch=facts.steps_per_epoch,
            first_step=facts.start,
            label="step",
            output=output,
        )
        self._log = MetricsLog(out / "metrics.jsonl", facts.start)
        uri = tracking_uri(recipe.tracking.uri, out)
        if uri is not None:
            assert facts.page is not None
            self.mlflow = MlflowTracker(
                out,
                uri=uri,
                experiment=recipe.tracking.experiment,
                run_name=recipe.tracking.run_name or facts.page.name,
                page=facts.page,
                params=recipe.flat() | dict(facts.used),
                tags=facts.tags,
            )

    def log(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Log a step; return without waiting for MLflow."""
        if self._guard is not None:
            self._guard()
        if self._log is not None:
            metrics, self._planned = {**metrics, **self._planned}, {}
            self._log.append(step, epoch, metrics)
            self.console.update(step, metrics)
        if self.mlflow is not None:
            self.mlflow.notify()

    def rewind(self, step: int) -> None:
        """Go back to a step: drop the rows after it, so that each step is logged once."""
        if self._log is not None:
            self._log.rewind(step)
            self.console.rewind(step)

    @property
    def mlflow_run_id(self) -> str | None:
        """ID of the MLflow run, on rank 0 and once MLflow has answered; else None."""
        return self.mlflow.run_id if self.mlflow is not None else None

    def sync(self) -> None:
        """Wait until what was logged is on the disk; call it before a checkpoint that counts on it."""
        if self._log is not None:
            self._log.sync()

    def tag(self, name: str, value: str) -> None:
        """Set a tag of the MLflow run."""
        if self.mlflow is not None:
            self.mlflow.set_tag(name, value)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Queue a file for MLflow."""
        if self.mlflow is not None:
            self.mlflow.log_artifact(path, folder)

    def figure(self, path: Path, name: str, step: int) -> None:
        """Queue a picture for MLflow, as a step of the figure `name`."""
        if self.mlflow is not None:
            self.mlflow.log_figure(path, name, step)

    def __enter__(self) -> Tracker:
        self.console.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._log is not None:
            self._log.close()
        if self.mlflow is not None:
            status = "FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED"
            self.mlflow.close(status)
        self.console.__exit__(kind, error, traceback)
        sys.stdout.flush()
