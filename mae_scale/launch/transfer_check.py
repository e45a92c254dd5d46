"""Checks on a run that will start from weights, or take words, that a run before it has still to train."""

from __future__ import annotations

import torch

from data_pipeline.errors import UsageError
from mae_scale.checkpoints.export import fresh_model, left_weights
from mae_scale.config.schema import STARTING, Recipe
from mae_scale.models.build import patch_grid
from mae_scale.models.classifier import Classifier
from mae_scale.models.dense import DenseModel
from mae_scale.models.weights.classifier import load_classifier
from mae_scale.models.weights.dense import load_dense

CLASSES, WORDS = 2, 2
"""As many on both sides: the data are not looked at."""


def without_weights(recipe: Recipe) -> Recipe:
    """Return a recipe for checks that would look for its starting weights, which are not there yet."""
    assert recipe.start is not None
    needs_none = recipe.start.model_copy(update={"weights": None, "from_scratch": True})
    return recipe.model_copy(update={STARTING[recipe.task]: needs_none})


def without_words(recipe: Recipe) -> Recipe:
    """Return a recipe that predicts words, for checks that would look for its tokeniser, which is not there yet."""
    predicts_pixels = recipe.model.model_copy(update={"target": "normalised_pixels"})
    return recipe.model_copy(update={"model": predicts_pixels, "tokeniser": None})


def refuse_other_model(name: str, start: Recipe, recipe: Recipe) -> None:
    """Raise UsageError when a run cannot start from the weights that the run `name` of `start` will leave."""
    try:
        with torch.device("meta"):
            left, grid = left_weights(fresh_model(start, classes=CLASSES, words=WORDS)), patch_grid(start.model)
            model = fresh_model(recipe, classes=CLASSES, words=WORDS)
            if isinstance(model, DenseModel):
                load_dense(model, left, grid)
            else:
                assert isinstance(model, Classifier)
                load_classifier(model, left, grid)
    except UsageError as error:
        raise UsageError(f"it starts from {name}, and {error}") from None
