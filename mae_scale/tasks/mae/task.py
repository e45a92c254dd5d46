"""Pre-training as a task: train a masked autoencoder, draw its reconstructions, export its weights."""

from typing import ClassVar

import torch

from data_pipeline.batch_layout import BatchLayout
from data_pipeline.index import Index
from mae_scale.engines.base import Engine
from mae_scale.models.build import build_model
from mae_scale.models.targets import PcaCoefficients
from mae_scale.models.vit import patchify
from mae_scale.planning.workload import Stack, Workload
from mae_scale.tasks.knn_accuracy import KnnAccuracy
from mae_scale.tasks.mae.objective import Reconstruct
from mae_scale.tasks.mae.reconstruct import Reconstructions
from mae_scale.tasks.mae.validation import reconstruction_loss
from mae_scale.tasks.masked_images import MaskedImages
from mae_scale.tasks.untrained import loss_of_guessing
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.preflight import training_augmentation
from mae_scale.training.self_check import Untrained
from mae_scale.training.shown_images import some_images
from mae_scale.training.task import Evaluator, Origin
from mae_scale.training.workload import workload_of

PCA_IMAGES = 256


class MaskedAutoencoding(MaskedImages[Reconstruct]):
    """Train a masked autoencoder to reconstruct removed patches (He et al., section 3)."""

    command: ClassVar[str] = "pretrain"

    def check(self, layout: BatchLayout) -> None:
        with torch.device("meta"):
            build_model(self.recipe)
        super().check(layout)

    def build(self, index: Index) -> Reconstruct:
        model = build_model(self.recipe, self.number_of_words)
        return Reconstruct(model, seed=self.recipe.seed, words=self.training_words(index))

    def initialise(self, objective: Reconstruct, index: Index) -> Origin:
        """Fit the PCA target on the patches of the run's first images: the same on every rank and at every start."""
        if self.recipe.model.target == "pca":
            images = some_images(index, PCA_IMAGES, self.recipe, training_augmentation(self.recipe))
            patches = patchify(images, objective.model.patch_size)
            target = objective.model.target
            assert isinstance(target, PcaCoefficients)
            target.fit(patches.flatten(0, 1))
        return super().initialise(objective, index)

    def workload(self, classes: int) -> Workload:
        with torch.device("meta"):
            tokeniser = self.planned_tokeniser()
            model = build_model(self.recipe, tokeniser.size.words if tokeniser else 2)
        size, pixels, width = model.encoder.size, 3 * model.patch_size**2, model.decoder.width
        removed, depth = model.patches - model.kept, len(model.decoder.blocks)
        encoded = 1 + (model.patches if model.encoder_mask_tokens else model.kept)
        work = workload_of(
            Reconstruct(model, seed=self.recipe.seed),
            self.recipe,
            stacks=(
                Stack(encoded, size.width, size.heads, size.depth, size.depth),
                Stack(1 + model.patches, width, model.decoder.heads, depth, depth),
            ),
            products=(
                (model.kept, pixels, size.width, True),
                (encoded, size.width, width, True),
                (removed, width, model.target.dim, True),
            ),
            predicted=removed * model.target.dim,
            # Of the encoder's last norm and the layer behind it, and of the decoder's.
            kept_values=2 * encoded * size.width + (1 + model.patches + removed) * width,
        )
        return self.with_tokeniser(work, tokeniser)

    def evaluators(self, context: RunContext, engine: Engine, tracker: Tracker) -> list[Evaluator]:
        with torch.device("meta"):  # only its masks and words are asked for
            objective = Reconstruct(build_model(self.recipe), seed=self.recipe.seed, words=self.words)
        found: list[Evaluator] = []
        if not self.predicts_words:
            found.append(Reconstructions(context, engine, tracker, objective))
        if self.recipe.data.val_root is not None:
            found.append(reconstruction_loss(context, engine, objective, self.evaluation_view()))
        if self.recipe.tracking.knn_images is not None:
            found.append(KnnAccuracy(context, engine))
        return found

    def untrained_loss(self, context: RunContext, objective: Reconstruct) -> Untrained | None:
        """Return the loss of predicting the mean of the target's values, or all words alike."""
        return loss_of_guessing(objective.model.target, context, objective.model.patch_size)
