"""Checks on a run that will start from weights, or take words, that a run before it has still to train."""

from __future__ import annotations

from collections.abc import Callable

import torch

from data_pipeline.errors import UsageError
from mae_scale.config.schema import STARTING, Recipe
from mae_scale.models.build import (
    build_beit,
    build_classifier_of,
    build_detector,
    build_moco_of,
    build_model,
    build_segmenter,
    patch_grid,
)
from mae_scale.models.dense import DenseModel
from mae_scale.models.weights.autoencoder import to_official
from mae_scale.models.weights.beit import beit_to_official
from mae_scale.models.weights.classifier import load_classifier
from mae_scale.models.weights.dense import load_dense

BUILD: dict[str, Callable[[Recipe, int], DenseModel]] = {
    "detection": build_detector,
    "segmentation": build_segmenter,
}


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
    classes = 2  # as many on both sides: the data are not looked at
    try:
        with torch.device("meta"):
            if start.task == "mae":
                left = to_official(build_model(start), decoder=False)
            elif start.task == "beit":
                left = beit_to_official(build_beit(start, 2))
            elif start.task == "moco":
                left = to_official(build_moco_of(start).encoder)
            elif start.task == "dvae":
                raise UsageError("that trains a tokeniser, and no encoder")
            elif start.task == "classification":
                left = build_classifier_of(start, classes).state_dict()
            else:
                left = BUILD[start.task](start, classes).state_dict()
            if recipe.task in BUILD:
                load_dense(BUILD[recipe.task](recipe, classes), left, patch_grid(start.model))
            else:
                load_classifier(build_classifier_of(recipe, classes), left, patch_grid(start.model))
    except UsageError as error:
        raise UsageError(f"it starts from {name}, and {error}") from None
