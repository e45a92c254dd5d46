"""BEiT as a task: predict the words of removed patches, or their pixels, and export the weights."""

from typing import ClassVar

import torch

from data_pipeline.batch_layout import BatchLayout
from data_pipeline.index import Index
from mae_scale.engines.base import Engine
from mae_scale.models.beit import Beit
from mae_scale.models.build import build_beit
from mae_scale.planning.workload import Stack, Workload
from mae_scale.tasks.beit.objective import PredictRemoved
from mae_scale.tasks.beit.validation import removed_patch_loss
from mae_scale.tasks.knn_accuracy import KnnAccuracy
from mae_scale.tasks.masked_images import MaskedImages
from mae_scale.tasks.untrained import loss_of_guessing
from mae_scale.tasks.words import WordSource
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.self_check import Untrained
from mae_scale.training.task import Evaluator
from mae_scale.training.workload import workload_of


class BeitPretraining(MaskedImages[PredictRemoved]):
    """Train BEiT's encoder to predict what was removed (Bao et al., section 2)."""

    command: ClassVar[str] = "pretrain"

    @property
    def kind(self) -> str:
        return "beit"

    def check(self, layout: BatchLayout) -> None:
        with torch.device("meta"):
            build_beit(self.recipe, 2)
        super().check(layout)

    def build(self, index: Index) -> PredictRemoved:
        model = build_beit(self.recipe, self.number_of_words)
        return self._objective(model, self.training_words(index))

    def workload(self, classes: int) -> Workload:
        with torch.device("meta"):
            tokeniser = self.planned_tokeniser()
            model = build_beit(self.recipe, tokeniser.size.words if tokeniser else 2)
        size = model.encoder.size
        work = workload_of(
            PredictRemoved(model, None, seed=0, global_batch=1),
            self.recipe,
            stacks=(Stack(1 + model.patches, size.width, size.heads, size.depth, size.depth, scaled=True),),
            products=(
                (model.patches, 3 * size.patch_size**2, size.width, True),
                (model.removed, size.width, model.target.dim, True),
            ),
            predicted=model.removed * model.target.dim,
            kept_values=(2 * (1 + model.patches) + model.removed) * size.width,  # of the last norm and the head
        )
        return self.with_tokeniser(work, tokeniser)

    def describe(self, objective: PredictRemoved) -> list[str]:
        model = objective.model
        what = f"words of {model.target.dim:,}" if model.predicts_words else "pixels"
        return [f"at most {model.removed} of {model.patches} patches are removed, and their {what} predicted"]

    def evaluators(self, context: RunContext, engine: Engine, tracker: Tracker) -> list[Evaluator]:
        found: list[Evaluator] = []
        if self.recipe.data.val_root is not None:
            with torch.device("meta"):  # only its masks and words are asked for
                objective = self._objective(build_beit(self.recipe, 2), self.words)
            found.append(removed_patch_loss(context, engine, objective, self.evaluation_view()))
        if self.recipe.tracking.knn_images is not None:
            found.append(KnnAccuracy(context, engine))
        return found

    def untrained_loss(self, context: RunContext, objective: PredictRemoved) -> Untrained | None:
        """Return the loss of predicting the mean of the target's values, or all words alike."""
        return loss_of_guessing(objective.model.target, context, objective.model.patch_size)

    def _objective(self, model: Beit, words: WordSource | None) -> PredictRemoved:
        recipe = self.recipe
        return PredictRemoved(model, words, seed=recipe.seed, global_batch=recipe.data.global_batch)
