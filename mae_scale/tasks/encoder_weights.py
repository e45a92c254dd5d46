"""What a pre-training leaves at its end: the weights in its folder, and its encoder as a model in MLflow."""

from functools import cache
from typing import Literal

import numpy as np

from mae_scale.checkpoints.export import checkpoint_model, export_weights
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.models.beit import Beit
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.moco import Moco
from mae_scale.reports.style import pictures_of
from mae_scale.tracking.mlflow_models import ServedEncoder, keep_model
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.shown_images import shown_images

FEATURES = {"mean": "mean of the patches' normed tokens", "cls": "the normed cls token"}


def leave_weights(context: RunContext, tracker: Tracker, pool: Literal["mean", "cls"], layout: str = "official") -> str:
    """Write export/model.safetensors of the last checkpoint in a layout; return a line that says where it is.

    pool: the feature of the encoder as MLflow serves it. On rank 0 alone; what is there already stays.
    """
    weights = context.out / "export" / "model.safetensors"

    @cache
    def trained() -> MaskedAutoencoder | Beit | Moco:
        model, _ = checkpoint_model(list_checkpoints(context.checkpoints)[-1][1])
        assert isinstance(model, MaskedAutoencoder | Beit | Moco)
        return model

    if not weights.exists():
        export_weights(trained(), weights, layout)
    if tracker.mlflow is not None:
        keep_model(
            tracker.mlflow,
            context.out,
            lambda: (ServedEncoder(trained().encoder, pool), np.rint(255 * pictures_of(shown_images(context, 1)))),
            metadata={"features": FEATURES[pool]},
        )
    return f"weights in {weights}"
