"""mlflow.json in a run's folder: its MLflow run, and the files that this run is still to get."""

import json
import logging
import threading
import uuid
from pathlib import Path
from typing import Any

from data_pipeline.files import write_json

logger = logging.getLogger(__name__)


class MlflowState:
    """Content of the file, written at each change. Threads share it.

    uri, experiment and run_id (None until the server has answered), key (finds a run whose id was lost with an answer)
    and artifacts, the queued files (see mlflow_artifacts).
    """

    def __init__(self, out_dir: Path):
        self._path = out_dir / "mlflow.json"
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {
            "uri": None,
            "experiment": None,
            "run_id": None,
            "key": uuid.uuid4().hex,
            "artifacts": [],
        }
        try:
            self._values.update(json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            pass
        except ValueError:
            logger.warning("%s is damaged; the run gets a new MLflow run", self._path)

    @property
    def run_id(self) -> str | None:
        """ID of the MLflow run; None until the server has answered for the first time."""
        run_id: str | None = self._values["run_id"]
        return run_id

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment."""
        return str(self._values["experiment"])

    @property
    def key(self) -> str:
        """Value of the tag that finds the MLflow run without its id."""
        return str(self._values["key"])

    @property
    def artifacts(self) -> list[dict[str, Any]]:
        """Queued files, in order."""
        queued: list[dict[str, Any]] = self._values["artifacts"]
        return queued

    def update(self, **values: Any) -> None:
        """Set values and write the file."""
        with self._lock:
            self._values.update(values)
            self._save()

    def add_artifact(self, entry: dict[str, Any]) -> None:
        """Queue a file."""
        with self._lock:
            self._values["artifacts"].append(entry)
            self._save()

    def drop_artifact(self) -> None:
        """Remove the first queued file."""
        with self._lock:
            self._values["artifacts"].pop(0)
            self._save()

    def _save(self) -> None:
        try:
            write_json(self._path, self._values)
        except OSError as error:
            logger.warning("%s could not be written: %s", self._path, error)


def mlflow_run_of(out_dir: Path) -> str | None:
    """Return the id of the MLflow run of the training in a folder; None where there is none, or no training."""
    try:
        run_id: str | None = json.loads((out_dir / "mlflow.json").read_text(encoding="utf-8"))["run_id"]
    except (OSError, ValueError, KeyError):
        return None
    return run_id
