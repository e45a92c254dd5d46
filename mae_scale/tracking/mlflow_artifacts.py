"""How a file gets into an MLflow run: into a folder, or as a step of a figure that MLflow's page steps through."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIGURES = "images"  # where MLflow keeps the steps of figures


def send_artifact(client, run_id: str, path: Path, entry: Mapping[str, Any]) -> None:
    """Send a file as its entry in mlflow.json says: artifact_path, a folder; or figure and step.

    Raises what MLflow raises.
    """
    if "figure" in entry:
        _send_step(client, run_id, path, entry["figure"], entry["step"])
    else:
        client.log_artifact(run_id, str(path), entry["artifact_path"])


def steps_of_figure(client, run_id: str, figure: str) -> list[int]:
    """Return the steps that MLflow has of a figure, in order; one that is there twice, twice.

    MLflow logs an image as KEY+step+STEP+timestamp+...png, and after it the same small, as ...+compressed.webp. It is
    there when both are.
    """
    files = (Path(file.path).name for file in client.list_artifacts(run_id, FIGURES))
    parts = (name.split("+") for name in files if name.endswith("+compressed.webp"))
    return sorted(int(part[2]) for part in parts if part[:2] == [figure, "step"])


def _send_step(client, run_id: str, path: Path, figure: str, step: int) -> None:
    """Log a picture once: an earlier start may have, or a request whose answer was lost."""
    from PIL import Image

    if step not in steps_of_figure(client, run_id, figure):
        with Image.open(path) as picture:
            client.log_image(run_id, picture, key=figure, step=step, synchronous=True)
