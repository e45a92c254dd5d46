"""The finished model in MLflow: pixels to class probabilities or to features, tied to the run's last metrics."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.files import write_json
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from mae_scale.models.beit import BeitEncoder
from mae_scale.models.classifier import Classifier
from mae_scale.models.vit import Encoder, patchify
from mae_scale.passwords import redacted, without_password
from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.tracking.mlflow_environment import ENVIRONMENT, reason
from mae_scale.tracking.mlflow_tracker import MlflowTracker

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

logger = logging.getLogger(__name__)

KEPT = "mlflow_model.json"  # in the run's export folder: what MLflow has
ANSWER_WAIT_S = 20.0
SLOWEST_UPLOAD_BYTES_PER_S = 20e6  # a server answers an upload when it has stored it


class Served(nn.Module):
    """A model of RGB pixels of its own image size; `name` in MLflow, `outputs` values per image."""

    name: ClassVar[str]
    outputs: int
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN))
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD))
        self.eval().requires_grad_(False)

    def images(self, pixels: Tensor) -> Tensor:
        """Return normalised images [N, 3, H, W] of pixels [N, H, W, 3], 0 to 255."""
        return ((pixels - self.mean) / self.std).permute(0, 3, 1, 2)


class ServedClassifier(Served):
    """A classifier from pixels to the probability of each class."""

    name = "classifier"
    model: Classifier

    def __init__(self, model: Classifier):
        super().__init__(model)
        self.outputs = model.classes

    def forward(self, pixels: Tensor) -> Tensor:
        """Return probabilities float32 [N, C] of pixels [N, H, W, 3], 0 to 255."""
        return self.model(self.images(pixels)).float().softmax(dim=-1)


class ServedEncoder(Served):
    """A pre-trained encoder from pixels to features."""

    name = "encoder"

    def __init__(self, encoder: Encoder | BeitEncoder, pool: Literal["mean", "cls"]):
        """pool: features are the mean of the patches' normed tokens, or the normed cls token."""
        super().__init__(encoder)
        self.patch_size, self.outputs, self.pool = encoder.size.patch_size, encoder.size.width, pool

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features float32 [N, D] of pixels [N, H, W, 3], 0 to 255."""
        tokens = self.model(patchify(self.images(pixels), self.patch_size)).float()
        return tokens[:, 1:].mean(dim=1) if self.pool == "mean" else tokens[:, 0]


def keep_model(
    tracker: MlflowTracker,
    out: Path,
    model_and_example: Callable[[], tuple[Served, np.ndarray]],
    *,
    metadata: Mapping[str, Any],
    registered_name: str | None = None,
) -> None:
    """Log a finished run's model into its MLflow run, once; a later call does what failed before.

    `model_and_example`: called when MLflow does not have the model yet; the arguments of `log_model`.
    `out`/export/mlflow_model.json records what MLflow has. Never fails: a server that does not answer, or refuses,
    costs a warning and at most about half a minute, and the time of an upload.
    """
    note = out / "export" / KEPT
    where = {"uri": without_password(tracker.uri), "run_id": tracker.run_id}
    kept = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    if where.items() <= kept.items() and registered_name in (None, kept["registered_name"]):
        return
    try:
        run_id = tracker.wait_for_run(ANSWER_WAIT_S)
        if run_id is None:
            raise TimeoutError(f"no answer in {ANSWER_WAIT_S:g} s")
        model, example = model_and_example()
        logged = log_model(
            model,
            uri=tracker.uri,
            run_id=run_id,
            example=example,
            metadata=metadata,
            registered_name=registered_name,
            scratch=note.parent,
        )
        _tie_metrics(tracker.uri, run_id, logged["model_uri"], read_metrics(out / "metrics.jsonl")[-1])
        content = where | {"run_id": run_id, "registered_name": registered_name} | logged
        write_json(note, content)
    except Exception as error:
        logger.warning(
            "MLflow (%s) did not take the model%s: %s. The run is complete without it; "
            "running the same command again logs it",
            redacted(tracker.uri),
            f" {registered_name}" if registered_name else "",
            reason(error),
        )


def log_model(
    model: Served,
    *,
    uri: str,
    run_id: str,
    example: np.ndarray,
    metadata: Mapping[str, Any],
    registered_name: str | None,
    scratch: Path,
) -> dict[str, str | None]:
    """Log `model`, on the host, to an MLflow run; return its "model_uri" and its registered "version" or None.

    mlflow.pytorch.load_model loads it by the URI.

    `example` float32 [1, H, W, 3], RGB pixels of 0 to 255, is kept as the model's input example; `metadata` with the
    model, such as class_names in the order of the probabilities. With `registered_name` it also becomes the next
    version of that name in the model registry. A call that was cut off is completed by the next: a run has one such
    model, and one version of it per name. `scratch`: a folder with room for the weights.

    The model is a pickle that names its class here: a program that loads or serves it needs mae-scale installed,
    in the version that logged it, as the model's requirements say. (MLflow's other format, an exported graph, is bound
    to the device that it was exported on, so that a server with a GPU refuses it.)
    Raises what MLflow raises.
    """
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModelOutput

    client = MlflowClient(uri)
    experiment_id = client.get_run(run_id).info.experiment_id
    where = f"name = '{model.name}' AND source_run_id = '{run_id}'"
    found = client.search_logged_models([experiment_id], where, max_results=1)
    logged = found[0] if found else client.create_logged_model(experiment_id, model.name, source_run_id=run_id)
    if logged.status != "READY":
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=scratch) as folder:
            path = Path(folder) / "model"
            _save(model, path, logged, example, metadata)
            with _timeout_in_environment_for(path):
                client.log_model_artifacts(logged.model_id, str(path))
        client.finalize_logged_model(logged.model_id, "READY")
    version = None if registered_name is None else _version(client, registered_name, run_id, logged)
    return {"model_uri": f"models:/{logged.model_id}", "version": version}


def _tie_metrics(uri: str, run_id: str, model_uri: str | None, row: Mapping[str, Any]) -> None:
    """Show the last logged row of a run on its model too: entries that the run has already, with the model's id."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    assert model_uri is not None
    model_id, time_ms, step = model_uri.rpartition("/")[2], int(1000 * row["time"]), row["step"]
    shown = {name: value for name, value in row.items() if name.startswith(("train/", "val/"))}
    metrics = [Metric(name, float(value), time_ms, step, model_id=model_id) for name, value in shown.items()]
    MlflowClient(uri).log_batch(run_id, metrics=metrics)


def _version(client: MlflowClient, name: str, run_id: str, logged: LoggedModel) -> str:
    """Return the version of a run's model under a registered name; make it where there is none."""
    from mlflow import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}' AND run_id = '{run_id}'")
    if versions:
        return str(versions[0].version)
    # By its place: a database without a server would look for `models:/ID` in the process's global tracking URI.
    place, model_id = logged.artifact_location, logged.model_id
    made = client.create_model_version(name, place, run_id, await_creation_for=0, model_id=model_id)
    return str(made.version)


def _save(model: Served, path: Path, logged: LoggedModel, example: np.ndarray, metadata: Mapping[str, Any]) -> None:
    """Write the model as MLflow's folder of files."""
    import mlflow.pytorch
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    float32 = np.dtype(np.float32)
    mlflow.pytorch.save_model(
        model,
        path,
        mlflow_model=Model(
            artifact_path=logged.artifact_location,
            run_id=logged.source_run_id,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
        ),
        signature=ModelSignature(
            inputs=Schema([TensorSpec(float32, (-1, *example.shape[1:]))]),
            outputs=Schema([TensorSpec(float32, (-1, model.outputs))]),
        ),
        input_example=example,
        pip_requirements=[f"{name}=={version(name)}" for name in ("mae-scale", "torch", "mlflow")],
        metadata=dict(metadata),
        serialization_format="pickle",
    )


@contextmanager
def _timeout_in_environment_for(path: Path) -> Iterator[None]:
    """Set MLflow's request timeout in the environment, for a block, to the time that storing the files may take."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name, ENVIRONMENT[name])
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    os.environ[name] = str(int(int(before) + size / SLOWEST_UPLOAD_BYTES_PER_S))
    try:
        yield
    finally:
        os.environ[name] = before
