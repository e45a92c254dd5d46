"""Files for the MLflow run of a training that has ended."""

import logging
from pathlib import Path

from mae_scale.passwords import redacted
from mae_scale.tracking.mlflow_environment import quieten_loggers, reason, set_environment
from mae_scale.tracking.mlflow_state import mlflow_run_of

logger = logging.getLogger(__name__)


def add_artifact(out: Path, uri: str, path: Path, folder: str) -> None:
    """Send a file into the folder `folder` of the MLflow run of the training in `out`; warn when that fails.

    Does nothing for a training that was not tracked.
    """
    run_id = mlflow_run_of(out)
    if run_id is None:
        return
    set_environment()
    from mlflow import MlflowClient

    quieten_loggers()

    try:
        MlflowClient(uri).log_artifact(run_id, str(path), folder)
    except Exception as error:
        logger.warning("MLflow (%s) did not take %s for %s: %s", redacted(uri), path, out, reason(error))
