"""A new SQLite database for MLflow, whole or not there. Imports nothing of MLflow."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from data_pipeline.files import create_whole
from mae_scale.tracking.mlflow_uri import sqlite_path


def new_sqlite_file(uri: str, fill: Callable[[str], object]) -> None:
    """Make a SQLite URI's database if there is none, whole or not at all; `fill(uri)` makes the tables.

    MLflow fills a new file table by table for seconds; a process killed meanwhile would leave a file that no later
    start can open.
    """
    path = sqlite_path(uri)
    if path is None or path.exists():
        return
    with tempfile.TemporaryDirectory(prefix="mlflow-") as folder:
        draft = Path(folder) / "mlflow.db"
        fill(f"sqlite:///{draft}")
        create_whole(path, draft.read_bytes())  # False: another run in the same folder was first
