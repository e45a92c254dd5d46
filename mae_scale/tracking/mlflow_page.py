"""What MLflow's page of a run shows beside its metrics: a description, and the images as data sets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mae_scale.passwords import redacted
from mae_scale.tracking.mlflow_sweep import NOTE_TAG, join_sweep

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ROLE_TAG = "mlflow.data.context"


@dataclass(frozen=True)
class Images:
    """A set of images, known by the digest of its index."""

    name: str
    digest: str
    """32 hex digits; MLflow takes up to 36 characters."""
    folder: str
    role: str
    """training or validation."""
    count: int
    classes: int


@dataclass(frozen=True)
class RunPage:
    """The name of a run, its description in Markdown, its images, and the sweep that it belongs to."""

    name: str
    description: str
    images: tuple[Images, ...]
    sweep: str | None = None


def complete_page(client: MlflowClient, run: Run, page: RunPage) -> None:
    """Give a run its description, data sets and parent run where it has none yet: what a user has written stays.

    Raises what MLflow raises.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if page.sweep is not None:
        join_sweep(client, run, page.sweep)
    if NOTE_TAG not in run.data.tags:
        client.set_tag(run.info.run_id, NOTE_TAG, redacted(page.description))
    given = run.inputs.dataset_inputs if run.inputs is not None else []
    known = {(one.dataset.digest, tag.value) for one in given for tag in one.tags if tag.key == ROLE_TAG}
    missing = [images for images in page.images if (images.digest, images.role) not in known]
    if missing:
        client.log_inputs(
            run.info.run_id,
            datasets=[
                DatasetInput(
                    Dataset(
                        name=images.name,
                        digest=images.digest,
                        source_type="local",
                        source=json.dumps({"uri": images.folder}),
                        profile=json.dumps({"num_images": images.count, "num_classes": images.classes}),
                    ),
                    [InputTag(ROLE_TAG, images.role)],
                )
                for images in missing
            ],
        )
