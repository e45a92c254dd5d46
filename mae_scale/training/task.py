"""The Protocol of a task: what a folder of mae_scale.tasks defines for one kind of training."""

from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from data_pipeline.augment.kinds import SecondView
from data_pipeline.batch_layout import BatchLayout
from data_pipeline.batches import Annotate
from data_pipeline.index import Index
from mae_scale.config.schema import Recipe
from mae_scale.engines.base import Engine, Objective
from mae_scale.models.build import size_of
from mae_scale.planning.workload import Workload
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.self_check import Untrained


class Origin(NamedTuple):
    """Where an objective's weights come from."""

    notes: list[str]
    """Human-readable lines, printed at the start."""
    facts: dict[str, Any]
    """Facts about it for each checkpoint's manifest."""


FROM_SCRATCH = Origin([], {})


class Evaluator(Protocol):
    """Measures or draws beside the loss. All ranks call it."""

    def due(self, done: int) -> bool:
        """Return whether it is to be called after update `done`."""

    def __call__(self, done: int) -> dict[str, float]:
        """Return metrics by name, after update `done`."""


ObjectiveT = TypeVar("ObjectiveT", bound=Objective)


class Task(Protocol[ObjectiveT]):
    """A recipe and its output folder under one task; everything common to all tasks lies in mae_scale.training.

    A task inherits from this class, and defines `command`, build(), training_flops(), workload() and finish().
    """

    command: ClassVar[str]
    """The command that trains it: pretrain or finetune."""
    planned_images: ClassVar[int] = 1_281_167
    planned_classes: ClassVar[int] = 1000
    """Training images and classes of the data set that a plan is made for: ImageNet-1K, where a task has no other."""
    recipe: Recipe
    out: Path

    def __init__(self, recipe: Recipe, out: Path):
        self.recipe, self.out = recipe, out

    @property
    def kind(self) -> str:
        """Return what kind of training it is, in a word."""
        return self.command

    def check(self, layout: BatchLayout) -> None:
        """Raise UsageError for what this task cannot do, before a rank is started."""

    def choose_images(self, index: Index) -> Index:
        """Select the training images, data.fraction of them; raise UsageError if they are unsuitable."""
        fraction = self.recipe.data.fraction
        return index if fraction is None else index.share(fraction, seed=self.recipe.seed)

    def check_fit(self, images: Index, validation: Index | None) -> None:
        """Raise UsageError if validation images or starting weights do not fit the training images and the recipe."""

    def second_view(self) -> SecondView | None:
        """Return the second view that is made of each training image, in Batch.second; None without one."""
        return None

    @property
    def selects_images(self) -> bool:
        """Return whether only some of data.root's images may be trained on."""
        return self.recipe.data.labels_per_class is not None or self.recipe.data.fraction is not None

    def keep(self, images: Index) -> None:
        """Write what else the ranks read into the run's folder, of its training images. Once, before the ranks meet."""

    def annotate(self, images: Index) -> Annotate | None:
        """Return what reads the annotations of training images; None where they have none but their labels."""
        return None

    def build(self, index: Index) -> ObjectiveT:
        """Return the objective on the host, initialised from torch's generator: the same on every rank."""
        ...

    def initialise(self, objective: ObjectiveT, index: Index) -> Origin:
        """Load the starting weights, unless the run has a checkpoint of its own. All ranks call it."""
        return FROM_SCRATCH

    def number_of_classes(self, images: Index) -> int:
        """Return the number of classes of the run on these training images; 0 without labels."""
        return len(images.classes)

    def training_flops(self) -> int:
        """Return the FLOPs per image, forward and backward."""
        ...

    def workload(self, classes: int) -> Workload:
        """Return the task's model in numbers, for planning; classes: of the data set, where it has any."""
        ...

    def model_in_words(self) -> tuple[str, str]:
        """Return the model's short name and its sizes, for a run's page."""
        name, size = self.recipe.model.name, size_of(self.recipe.model)
        sizes = f"width {size.width}, {size.depth} blocks, patches of {size.patch_size} px"
        return name or f"{size.width}x{size.depth}", sizes

    def describe(self, objective: ObjectiveT) -> list[str]:
        """Return lines about what is trained, printed at the start."""
        return []

    def evaluators(self, context: RunContext, engine: Engine, tracker: Tracker) -> list[Evaluator]:
        """Return what measures or draws at intervals beside the loss."""
        return []

    def untrained_loss(self, context: RunContext, objective: ObjectiveT) -> Untrained | None:
        """Return the loss of a model that does not look at the images; None where it is not known. On rank 0 alone."""
        return None

    def finish(self, context: RunContext, tracker: Tracker) -> str:
        """Write weights and figures after the whole schedule, on rank 0; return a line that says where they are."""
        ...
