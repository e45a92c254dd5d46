"""All that a run says of itself, on rank 0: the terminal, metrics.jsonl and MLflow. Other ranks say nothing."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mae_scale.config.schema import Recipe
from mae_scale.tracking.console import Console, NullConsole
from mae_scale.tracking.metrics_log import MetricsLog
from mae_scale.tracking.mlflow_tracker import MlflowTracker
from mae_scale.tracking.mlflow_uri import tracking_uri
from mae_scale.tracking.output import Output


class Tracking:
    """One place to log to, as a context manager; with `speaks` False (every rank but 0) it does nothing."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        *,
        speaks: bool,
        start: int,
        total_steps: int,
        steps_per_epoch: int,
        used: Mapping[str, Any],
        tags: Mapping[str, Any],
        output: Output | None = None,
        guard: Callable[[], None] | None = None,
    ):
        """start: the updates already done; total_steps: after this many this start ends.

        used: what of the recipe's keys this start has decided itself, by key; guard: called before a step is logged, it
        ends a process that may no longer write.
        """
        self._log, self._guard = None, guard
        self.mlflow: MlflowTracker | None = None  # rank 0's, unless tracking is off
        self.console = NullConsole()
        if not speaks:
            return
        self.console = Console(
            total_steps, steps_per_epoch=steps_per_epoch, first_step=start, label="step", output=output
        )
        self._log = MetricsLog(out / "metrics.jsonl", start)
        uri = tracking_uri(recipe.tracking.uri, out)
        if uri is not None:
            self.mlflow = MlflowTracker(
                out,
                uri=uri,
                experiment=recipe.tracking.experiment,
                run_name=recipe.tracking.run_name,
                params=recipe.flat() | dict(used),
                tags=tags,
            )

    def log(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """Log a step; returns without waiting for MLflow."""
        if self._guard is not None:
            self._guard()
        if self._log is not None:
            self._log.append(step, epoch, metrics)
            self.console.update(step, metrics)
        if self.mlflow is not None:
            self.mlflow.notify()

    def rewind(self, step: int) -> None:
        """The run has gone back to a step: rows behind it are dropped, and each step is still there once."""
        if self._log is not None:
            self._log.rewind(step)
            self.console.rewind(step)

    @property
    def mlflow_run_id(self) -> str | None:
        """The id of the MLflow run, on rank 0 and once MLflow has answered."""
        return self.mlflow.run_id if self.mlflow is not None else None

    def sync(self) -> None:
        """Wait until what was logged is on the disk; before a checkpoint that counts on it."""
        if self._log is not None:
            self._log.sync()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Send a file to MLflow, when its turn comes."""
        if self.mlflow is not None:
            self.mlflow.log_artifact(path, folder)

    def figure(self, path: Path, name: str, step: int) -> None:
        """Send a picture to MLflow as a step of the figure `name`, when its turn comes."""
        if self.mlflow is not None:
            self.mlflow.log_figure(path, name, step)

    def __enter__(self) -> "Tracking":
        self.console.__enter__()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._log is not None:
            self._log.close()
        if self.mlflow is not None:
            status = "FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED"
            self.mlflow.close(status)
        self.console.__exit__(kind, error, traceback)
        sys.stdout.flush()
