"""Uploads into an MLflow run: a file into a folder, or a picture as a step of a figure on MLflow's page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

FIGURES = "images"  # where MLflow keeps the steps of figures


def send_artifact(client: MlflowClient, run_id: str, path: Path, entry: Mapping[str, Any]) -> None:
    """Send a file to where its entry in mlflow.json says: artifact_path, a folder; or figure and step.

    Raises what MLflow raises.
    """
    if "figure" in entry:
        _send_step(client, run_id, path, entry["figure"], entry["step"])
    else:
        client.log_artifact(run_id, str(path), entry["artifact_path"])


def steps_of_figure(client: MlflowClient, run_id: str, figure: str) -> list[int]:
    """Return the steps of a figure that MLflow has, in order, with duplicates.

    MLflow logs an image as KEY+step+STEP+timestamp+...png, and after it a small copy as ...+compressed.webp; the step
    is complete when both exist.
    """
    files = (Path(file.path).name for file in client.list_artifacts(run_id, FIGURES))
    parts = (name.split("+") for name in files if name.endswith("+compressed.webp"))
    return sorted(int(part[2]) for part in parts if part[:2] == [figure, "step"])


def _send_step(client: MlflowClient, run_id: str, path: Path, figure: str, step: int) -> None:
    """Log a picture unless MLflow has it, from an earlier start or from a request whose answer was lost."""
    from PIL import Image

    if step not in steps_of_figure(client, run_id, figure):
        with Image.open(path) as picture:
            client.log_image(run_id, picture, key=figure, step=step, synchronous=True)
