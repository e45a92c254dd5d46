"""Common part of MAE and BEiT: they predict the pixels of removed patches, or a tokeniser's words for them."""

from dataclasses import replace
from functools import cached_property

from data_pipeline.augment.kinds import SecondView
from data_pipeline.batch_layout import BatchLayout
from data_pipeline.index import Index
from mae_scale.models.targets import WORDS
from mae_scale.models.tokeniser import Tokeniser
from mae_scale.planning.workload import CROSS_ENTROPY, Workload
from mae_scale.tasks.encoder_weights import leave_weights
from mae_scale.tasks.knn_accuracy import check_knn
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
    word_grid,
)
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.task import ObjectiveT, Origin, Task


class MaskedImages(Task[ObjectiveT]):
    """A task whose model.target is of removed patches; with "tokens" their words, by the recipe's tokeniser."""

    @property
    def predicts_words(self) -> bool:
        """Return whether words are predicted."""
        return self.recipe.model.target == WORDS

    @cached_property
    def words(self) -> WordSource | None:
        """The tokeniser that finds the words; None where pixels are predicted."""
        return source_of(self.recipe) if self.predicts_words else None

    def training_words(self, index: Index) -> WordSource | None:
        """Return the source of the training images' words: of the disk, where the recipe names a place."""
        return stored(self.recipe, self.words, index)

    @property
    def number_of_words(self) -> int:
        """The size of the tokeniser's vocabulary; any number where pixels are predicted."""
        return self.words.words if self.words else 2

    def check(self, layout: BatchLayout) -> None:
        if self.predicts_words:
            check_words(self.recipe)

    def check_fit(self, images: Index, validation: Index | None) -> None:
        check_knn(self.recipe, images, validation)
        if self.words is not None:
            refuse_other_tokeniser(self.recipe, self.words, self.out)
            self.training_words(images)

    def second_view(self) -> SecondView | None:
        return training_view(self.recipe) if self.predicts_words else None

    def evaluation_view(self) -> SecondView | None:
        """Return the second view of validation images, whose words are always found anew."""
        return view_of(self.recipe) if self.predicts_words else None

    def initialise(self, objective: ObjectiveT, index: Index) -> Origin:
        """Return the tokeniser's digest and number of words for the checkpoints; all ranks begin with equal weights."""
        return origin_of(self.words)

    def training_flops(self) -> int:
        """Return the FLOPs per image: the model's, forward and backward, and the tokeniser's, forward."""
        work = self.workload(0)
        return work.forward_flops + work.backward_flops

    def planned_tokeniser(self) -> Tokeniser | None:
        """Return a tokeniser of the recipe's size, on the device that is the default; None without one."""
        return Tokeniser(size_of_tokeniser(self.recipe)) if self.predicts_words else None

    def with_tokeniser(self, work: Workload, tokeniser: Tokeniser | None) -> Workload:
        """Return a workload whose loss is of words, and where they are not on the disk that of finding them too."""
        if tokeniser is None:
            return work
        work = replace(work, loss=CROSS_ENTROPY)
        return work if tokens_of(self.recipe) is not None else add_tokeniser(work, tokeniser, word_grid(self.recipe))

    def finish(self, context: RunContext, tracker: Tracker) -> str:
        return leave_weights(context, tracker, "mean")
