"""The sweep in MLflow that the runs in a folder belong to."""

from __future__ import annotations

import contextlib
from pathlib import Path

from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe
from mae_scale.tracking.mlflow_sweep import MlflowSweep


def sweep_of_runs(folder: Path) -> MlflowSweep | None:
    """Return the sweep that the runs in FOLDER/* are children of; None where they are none, or are not tracked."""
    for path in sorted(folder.glob("*/recipe.yaml")):
        with contextlib.suppress(UsageError):
            tracking = load_recipe(str(path)).tracking
            if tracking.sweep is not None:
                return MlflowSweep.of(tracking, folder, tracking.sweep, key=None)
    return None
