"""k-NN classification on frozen features, without training anything.

Source: the weighted vote of Wu et al., arXiv 1805.01978, with the settings that DINO made usual (arXiv 2104.14294):
cosine similarity, each of the k nearest votes with exp(similarity / 0.07).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.augment.kinds import augmentation
from data_pipeline.batch_order import EvaluationOrder
from data_pipeline.errors import UsageError
from data_pipeline.index import Index
from data_pipeline.index_build import open_index
from data_pipeline.loader import ImageLoader
from mae_scale.checkpoints.export import grid_of_weights, naming, starting_point, weights_of
from mae_scale.config.required import required
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import first_then_others
from mae_scale.distributed.ranks import Ranks
from mae_scale.models.build import build_classifier_of
from mae_scale.models.classifier import Classifier
from mae_scale.models.weights.classifier import classes_in, load_classifier
from mae_scale.reports.classification import neighbours_figure
from mae_scale.tasks.classification.accuracy import Accuracy
from mae_scale.tasks.classification.datasets import EvaluationSet, folder_set, refuse_unlabelled
from mae_scale.tasks.classification.evaluate import FORM, check_inputs
from mae_scale.tasks.classification.measure import report
from mae_scale.tasks.evaluation import Predict, all_ranks, predictor, validation_root
from mae_scale.tasks.starting_weights import weights_path
from mae_scale.tracking.finished_run import add_artifact
from mae_scale.tracking.mlflow_uri import tracking_uri
from mae_scale.training.decoding import decoding_on_cpu
from mae_scale.training.evaluation_loader import evaluation_loader

TEMPERATURE, NEIGHBOURS = 0.07, 20
SHOWN, NEAREST_SHOWN = 8, 7  # in the picture
CHUNK = 4096  # training features compared with a batch at a time


@dataclass(frozen=True)
class Features:
    """Features of n images.

    `vectors` float32 [n, D] of length 1, `labels` int64 [n], `images` int64 [n], rows of the index.
    """

    vectors: Tensor
    labels: Tensor
    images: Tensor

    def with_classes(self, class_of: np.ndarray) -> Features:
        """Return them with class_of int64 [classes] of each label in its place."""
        return replace(self, labels=torch.from_numpy(class_of).to(self.labels.device)[self.labels])


class FeaturesOf(torch.nn.Module):
    """A classifier's pooled features, before its head."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> [B, D]."""
        return self.model.features(images)


def check(recipe: Recipe) -> None:
    """Raise UsageError for what can be refused before a rank is started."""
    check_inputs(recipe)
    known_root(recipe)


def known_root(recipe: Recipe) -> Path:
    """Return data.root. Raises UsageError when it is not set."""
    advice = "add data.root=/path/to/train, whose images vote (a folder per class)"
    return required(recipe.data.root, "data.root", advice)


def nearest_neighbours(recipe: Recipe, neighbours: int, figure: Path | None) -> dict[str, Any] | None:
    """Return top-1 and top-5 of k-NN: data.val_root's images by those of data.root; on rank 0, else None.

    Training images (data.labels_per_class of each class or data.fraction of all, where set) and validation images are
    cut as in evaluation.
    {"k": k, "top1": percent, "top5": percent, "images": n, "per_class": [...]}.
    """
    with all_ranks(recipe) as (ranks, device):
        model, index, one = first_then_others(lambda: _opened(recipe))
        predict = predictor(FeaturesOf(model), recipe, device)
        known = gathered(features(predict, index, recipe, ranks, device))
        asked = features(predict, one.index, recipe, ranks, device).with_classes(one.class_of)
        accuracy = accuracy_of(asked, known, classes=len(index.classes), neighbours=neighbours)
        if not ranks.is_first:
            return None
        if figure is not None:
            try:
                _draw(asked, known, validation=one.index, index=index, recipe=recipe, path=figure)
            except OSError as error:
                raise UsageError(f"--figure {figure} cannot be written: {error.strerror}") from None
            _to_mlflow(recipe, figure)
    return {"k": neighbours, **report(accuracy, index.classes, one.index)}


def _opened(recipe: Recipe) -> tuple[Classifier, Index, EvaluationSet]:
    """Return the model with its weights, the training images and those to be classified."""
    data = recipe.data
    index = open_index(known_root(recipe), data.index)
    refuse_unlabelled(index)
    if data.labels_per_class is not None:
        index = index.few(data.labels_per_class, seed=recipe.seed)
    elif data.fraction is not None:
        index = index.share(data.fraction, seed=recipe.seed)
    one = folder_set(
        open_index(validation_root(recipe, FORM), progress=False),
        num_classes=len(index.classes),
        class_names=index.classes,
    )
    source = starting_point(weights_path(recipe))
    state = weights_of(source)
    model = build_classifier_of(recipe, classes_in(state) or len(index.classes))
    with naming(source):
        load_classifier(model, state, grid_of_weights(source))
    return model.eval(), index, one


def features(predict: Predict, index: Index, recipe: Recipe, ranks: Ranks, device: torch.device) -> Features:
    """Return this rank's part of the images of an index."""
    vectors, labels, images = [], [], []
    with evaluation_loader(recipe, index, ranks) as loader:
        for batch in loader:
            valid = torch.from_numpy(batch.valid)
            found = functional.normalize(predict(batch.images.to(device)), dim=1)
            vectors.append(found[valid.to(device)])
            labels.append(batch.labels.cpu()[valid])
            images.append(torch.from_numpy(batch.sample_ids)[valid])
    return Features(torch.cat(vectors), torch.cat(labels).to(device), torch.cat(images).to(device))


def gathered(part: Features) -> Features:
    """Return the features of all ranks, on each, in the order of the images: the same for any number of ranks."""
    world_size = torch.distributed.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64, device=part.labels.device) for _ in range(world_size)]
    torch.distributed.all_gather(counts, torch.tensor([len(part.labels)], device=part.labels.device))
    most = max(int(count) for count in counts)

    def whole(tensor: Tensor) -> Tensor:
        padded = tensor.new_zeros((most, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(world_size)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([p[: int(count)] for p, count in zip(parts, counts, strict=True)])

    vectors, labels, images = (whole(tensor) for tensor in (part.vectors, part.labels, part.images))
    order = torch.argsort(images)
    return Features(vectors[order], labels[order], images[order])


def accuracy_of(asked: Features, known: Features, *, classes: int, neighbours: int) -> Accuracy:
    """Return the accuracy of asked, of which each rank has a part, by known, all of them; over all ranks."""
    accuracy = Accuracy(classes)
    for first in range(0, len(asked.labels), CHUNK):
        part = slice(first, first + CHUNK)
        similarity, nearest = search(asked.vectors[part], known.vectors, neighbours)
        scores = vote(similarity, known.labels[nearest], classes)
        accuracy.update(scores, asked.labels[part], np.ones(len(scores), bool))
    accuracy.reduce()
    return accuracy


def search(asked: Tensor, known: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Map asked [B, D], known [n, D] -> similarity [B, k] and rows int64 [B, k] of the k nearest, the nearest first."""
    similarity = asked.new_empty((len(asked), 0))
    rows = torch.empty((len(asked), 0), dtype=torch.int64, device=asked.device)
    for first in range(0, len(known), CHUNK):
        part = asked @ known[first : first + CHUNK].T
        numbers = torch.arange(first, first + part.shape[1], device=asked.device).expand_as(part)
        similarity, rows = torch.cat([similarity, part], dim=1), torch.cat([rows, numbers], dim=1)
        similarity, kept = similarity.topk(min(neighbours, similarity.shape[1]), dim=1)
        rows = rows.gather(1, kept)
    return similarity, rows


def vote(similarity: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Map similarity [B, k], the neighbours' labels int64 [B, k] -> log votes of each class [B, classes]."""
    weights = (similarity / TEMPERATURE).exp()
    votes = torch.zeros((len(labels), classes), device=labels.device).scatter_add_(1, labels, weights)
    return votes.clamp_min(torch.finfo(votes.dtype).tiny).log()


def _draw(asked: Features, known: Features, validation: Index, index: Index, recipe: Recipe, path: Path) -> None:
    """Draw some validation images of this rank, each with its nearest training images."""
    rows = torch.linspace(0, len(asked.labels) - 1, min(SHOWN, len(asked.labels))).long()
    _, nearest = search(asked.vectors[rows], known.vectors, NEAREST_SHOWN)
    near = nearest.flatten()
    queries = _images(validation, asked.images[rows], recipe)
    neighbours = _images(index, known.images[near], recipe).unflatten(0, nearest.shape)
    labels = known.labels[near].reshape(nearest.shape)
    neighbours_figure(queries, neighbours, asked.labels[rows].cpu(), labels.cpu(), class_names=index.classes, path=path)


def _to_mlflow(recipe: Recipe, figure: Path) -> None:
    """Add the figure to the MLflow run that trained the weights, where there is one."""
    weights = weights_path(recipe)
    uri = tracking_uri(recipe.tracking.uri, weights)
    if uri is not None:
        add_artifact(weights, uri, figure, "figures")


def _images(index: Index, rows: Tensor, recipe: Recipe) -> Tensor:
    """Return images [n, 3, H, W] float32 of the index, cut as in evaluation, decoded on the host."""
    asked = index.take(rows.cpu().numpy())
    decoding = decoding_on_cpu(recipe, augmentation("evaluation"))
    with ImageLoader(asked, EvaluationOrder(len(asked)), decoding) as loader:
        return next(iter(loader)).images
