"""A few of a run's images for figures and statistics, the same on every rank and at every start."""

import torch

from data_pipeline.augment.kinds import Augmentation, SecondView, augmentation
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import TrainingOrder
from data_pipeline.batches import Batch
from data_pipeline.index import Index, load_index
from data_pipeline.loader import ImageLoader
from mae_scale.config.schema import Recipe
from mae_scale.training.context import RunContext
from mae_scale.training.decoding import decoding_on_cpu
from mae_scale.training.inputs import VALIDATION


def shown_images(context: RunContext, count: int) -> torch.Tensor:
    """Return some validation images (training images without data.val_root) [N, 3, S, S], cut as in evaluation."""
    root = context.recipe.data.val_root
    index = context.index if root is None else load_index(context.out / VALIDATION, root)
    return some_images(index, count, context.recipe, augmentation("evaluation"))


def some_images(index: Index, count: int, recipe: Recipe, kind: Augmentation) -> torch.Tensor:
    """Return up to `count` images [N, 3, S, S] float32 drawn by the recipe's seed, decoded on the CPU."""
    return some_batch(index, count, recipe, kind).images


def some_batch(index: Index, count: int, recipe: Recipe, kind: Augmentation, second: SecondView | None = None) -> Batch:
    """Return those images as a batch, with a second view where one is given."""
    count = min(count, len(index))
    order = TrainingOrder(batch_layout(count), seed=recipe.seed, stop_step=1)
    with ImageLoader(index, order, decoding_on_cpu(recipe, kind, second)) as loader:
        return next(iter(loader))
