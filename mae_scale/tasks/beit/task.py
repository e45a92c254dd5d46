"""BEiT as a task: predict the words of removed patches, or their pixels, and export the weights."""

from functools import cached_property
from typing import ClassVar

import torch

from data_pipeline.augment.kinds import SecondView
from data_pipeline.batch_layout import BatchLayout
from data_pipeline.index import Index
from mae_scale.engines.base import Engine
from mae_scale.models.beit import Beit
from mae_scale.models.build import build_beit
from mae_scale.models.tokeniser import Tokeniser
from mae_scale.planning.workload import Stack, Workload
from mae_scale.tasks.beit.objective import PredictRemoved
from mae_scale.tasks.beit.validation import removed_patch_loss
from mae_scale.tasks.encoder_weights import leave_weights
from mae_scale.tasks.knn_accuracy import KnnAccuracy, check_knn
from mae_scale.tasks.untrained import loss_of_guessing
from mae_scale.tasks.words import (
    WordSource,
    add_tokeniser,
    check_words,
    origin_of,
    refuse_other_tokeniser,
    size_of_tokeniser,
    source_of,
    stored,
    tokens_of,
    training_view,
    view_of,
)
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.self_check import Untrained
from mae_scale.training.task import Evaluator, Origin, Task
from mae_scale.training.workload import workload_of


class BeitPretraining(Task[PredictRemoved]):
    """Train BEiT's encoder to predict what was removed (Bao et al., section 2)."""

    command: ClassVar[str] = "pretrain"

    @property
    def kind(self) -> str:
        return "beit"

    @property
    def _predicts_words(self) -> bool:
        return self.recipe.model.target == "tokens"

    @cached_property
    def _words(self) -> WordSource | None:
        """What gives the words; None where pixels are predicted."""
        return source_of(self.recipe) if self._predicts_words else None

    def check(self, layout: BatchLayout) -> None:
        with torch.device("meta"):
            build_beit(self.recipe, 2)
        if self._predicts_words:
            check_words(self.recipe)

    def check_fit(self, images: Index, validation: Index | None) -> None:
        check_knn(self.recipe, images, validation)
        if self._words is not None:
            refuse_other_tokeniser(self.recipe, self._words, self.out)
            stored(self.recipe, self._words, images)

    def second_view(self) -> SecondView | None:
        return training_view(self.recipe) if self._predicts_words else None

    def build(self, index: Index) -> PredictRemoved:
        model = build_beit(self.recipe, self._words.words if self._words else 2)
        return self._objective(model, stored(self.recipe, self._words, index))

    def initialise(self, objective: PredictRemoved, index: Index) -> Origin:
        """Return the tokeniser's digest and number of words for the checkpoints; all ranks begin with equal weights."""
        return origin_of(self._words)

    def training_flops(self) -> int:
        """Return the FLOPs per image: the model's, forward and backward, and the tokeniser's, forward."""
        work = self.workload(0)
        return work.forward_flops + work.backward_flops

    def workload(self, classes: int) -> Workload:
        with torch.device("meta"):
            tokeniser = Tokeniser(size_of_tokeniser(self.recipe)) if self._predicts_words else None
            model = build_beit(self.recipe, tokeniser.size.words if tokeniser else 0)
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
        )
        if tokeniser is None or tokens_of(self.recipe) is not None:
            return work
        return add_tokeniser(work, tokeniser, model.grid)

    def describe(self, objective: PredictRemoved) -> list[str]:
        model = objective.model
        what = f"words of {model.target.dim:,}" if model.predicts_words else "pixels"
        return [f"at most {model.removed} of {model.patches} patches are removed, and their {what} predicted"]

    def evaluators(self, context: RunContext, engine: Engine, tracker: Tracker) -> list[Evaluator]:
        found: list[Evaluator] = []
        if self.recipe.data.val_root is not None:
            with torch.device("meta"):  # only its masks and words are asked for
                objective = self._objective(build_beit(self.recipe, 2), self._words)
            view = view_of(self.recipe) if self._predicts_words else None
            found.append(removed_patch_loss(context, engine, objective, view))
        if self.recipe.tracking.knn_images is not None:
            found.append(KnnAccuracy(context, engine))
        return found

    def untrained_loss(self, context: RunContext, objective: PredictRemoved) -> Untrained | None:
        """Return the loss of predicting the mean of the target's values, or all words alike."""
        return loss_of_guessing(objective.model.target, context, objective.model.patch_size)

    def finish(self, context: RunContext, tracker: Tracker) -> str:
        return leave_weights(context, tracker, "mean")

    def _objective(self, model: Beit, words: WordSource | None) -> PredictRemoved:
        recipe = self.recipe
        return PredictRemoved(model, words, seed=recipe.seed, global_batch=recipe.data.global_batch)
