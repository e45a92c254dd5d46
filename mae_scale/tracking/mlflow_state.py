"""mlflow.json in a run's folder: which MLflow run it is, and which files that run is still to get."""

import json
import logging
import threading
import uuid
from pathlib import Path
from typing import Any

from data_pipeline.files import write_json

logger = logging.getLogger(__name__)


class MlflowState:
    """What the file says; written at each change. Threads share it.

    uri, experiment and run_id (None until the server has answered), key (finds a run whose id got lost with an answer)
    and artifacts, the files that wait (see mlflow_artifacts).
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

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def update(self, **values: Any) -> None:
        with self._lock:
            self._values.update(values)
            self._save()

    def add_artifact(self, entry: dict[str, Any]) -> None:
        """Let a file wait, behind the others."""
        with self._lock:
            self._values["artifacts"].append(entry)
            self._save()

    def drop_artifact(self) -> None:
        """The first file that waits no longer does."""
        with self._lock:
            self._values["artifacts"].pop(0)
            self._save()

    def _save(self) -> None:
        try:
            write_json(self._path, self._values)
        except OSError as error:
            logger.warning("%s could not be written: %s", self._path, error)
