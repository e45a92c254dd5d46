"""What is recorded of the weights that a run starts from: place, digest, and the MLflow run that made them."""

import json

import pytest

from mae_scale.checkpoints.store import write_manifest
from mae_scale.training.inputs import started_from


@pytest.mark.parametrize("known", ["run-id", None])
def test_a_checkpoint_names_the_mlflow_run_of_its_manifest(known, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    write_manifest(folder, {"step": 1, "mlflow_run_id": known}, {})
    found = started_from(tmp_path / "new", folder)
    assert found.pop("manifest_sha256")
    assert found == {"path": str(folder), "mlflow_run_id": known}


@pytest.mark.parametrize("state", ['{"run_id": "run-id"}', '{"run_id": null}', "{", None])
def test_a_runs_exported_file_names_the_mlflow_run_in_its_folder(state, tmp_path):
    weights = tmp_path / "run" / "export" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    if state is not None:
        (tmp_path / "run" / "mlflow.json").write_text(state)
    found = started_from(tmp_path / "new", weights)
    assert len(found["sha256"]) == 64
    assert found["mlflow_run_id"] == ("run-id" if state and "run-id" in json.dumps(state) else None)
