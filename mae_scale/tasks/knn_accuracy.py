"""The k-NN accuracy of the encoder's features on data.val_root in pre-training."""

import numpy as np
import torch

from data_pipeline.index import Index, load_index
from data_pipeline.rng import generator
from mae_scale.config.schema import Recipe
from mae_scale.engines.base import Engine
from mae_scale.tasks.classification.datasets import folder_set, refuse_unlabelled
from mae_scale.tasks.classification.knn import NEIGHBOURS, Features, accuracy_of, features, gathered
from mae_scale.training.context import RunContext
from mae_scale.training.inputs import VALIDATION


def check_knn(recipe: Recipe, images: Index, validation: Index | None) -> None:
    """Raise UsageError when k-NN is asked for and the images have no classes, or the validation images others."""
    if recipe.tracking.knn_images is not None and validation is not None:
        refuse_unlabelled(images)
        folder_set(validation, num_classes=len(images.classes), class_names=images.classes)


class KnnAccuracy:
    """An evaluator: val/knn_top1, percent, when val/loss is measured.

    Of the validation images by tracking.knn_images training images, drawn by the recipe's seed, all cut as in
    evaluation; features are what the objective gives of an image in evaluation mode. The vote is that of
    `mae-scale knn`.
    """

    def __init__(self, context: RunContext, engine: Engine):
        root, count = context.recipe.data.val_root, context.recipe.tracking.knn_images
        assert root is not None
        assert count is not None
        self._context, self._engine = context, engine
        self._known = some_of(context.index, count, seed=context.recipe.seed)
        validation, classes = load_index(context.out / VALIDATION, root), context.index.classes
        self._asked = folder_set(validation, num_classes=len(classes), class_names=classes)

    def due(self, done: int) -> bool:
        return self._context.evaluation_is_due(done)

    def __call__(self, done: int) -> dict[str, float]:
        classes = len(self._context.index.classes)
        with torch.compiler.set_stance("force_eager"):
            known, asked = gathered(self._features(self._known)), self._features(self._asked.index)
        asked = asked.with_classes(self._asked.class_of)
        return {"val/knn_top1": accuracy_of(asked, known, classes=classes, neighbours=NEIGHBOURS).results()["top1"]}

    def _features(self, index: Index) -> Features:
        context = self._context
        return features(
            lambda images: self._engine.predict(images).float(), index, context.recipe, context.ranks, context.device
        )


def some_of(index: Index, count: int, *, seed: int) -> Index:
    """Return `count` images of an index, drawn by the seed, in its order; all where it has fewer."""
    draws = generator(seed, "knn", 0).bit_generator.random_raw(len(index))
    return index.take(np.sort(np.argsort(draws, kind="stable")[:count]))
