"""Detection as a task: Mask R-CNN on the encoder, for boxes and masks of objects."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from data_pipeline.annotations.coco import read_coco
from data_pipeline.batch_layout import BatchLayout
from data_pipeline.batches import Annotate
from data_pipeline.errors import UsageError
from data_pipeline.index import Index, load_index
from data_pipeline.plan import BatchPlan
from mae_scale.distributed.collectives import from_first
from mae_scale.engines.base import Engine
from mae_scale.models.build import build_detector, missing_extra
from mae_scale.planning.workload import Workload
from mae_scale.tasks.dense_transfer import DenseTransfer
from mae_scale.tasks.detection.annotations import DIGEST, NEEDED, TrainingObjects
from mae_scale.tasks.detection.objective import DetectObjects, SeenObjects
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.inputs import VALIDATION
from mae_scale.training.task import Evaluator, Origin
from mae_scale.training.workload import workload_of

if TYPE_CHECKING:
    from mae_scale.tasks.detection.evaluation_set import DetectionSet


class Detection(DenseTransfer[DetectObjects]):
    """Train Mask R-CNN (He et al., arXiv 1703.06870) with ViTDet's pyramid and heads (Li et al., arXiv 2203.16527)."""

    planned_images: ClassVar[int] = 117_266  # COCO's that have objects
    planned_classes: ClassVar[int] = 80
    needed: ClassVar[dict[str, str]] = NEEDED

    def objective(self, classes: int) -> DetectObjects:
        return DetectObjects(build_detector(self.recipe, classes), seed=self.recipe.seed)

    kept: ClassVar[str] = "annotations"

    @cached_property
    def objects(self) -> TrainingObjects:
        """The objects of the run's training images."""
        path = self.recipe.detecting.annotations
        return TrainingObjects(self.recipe, self.out, path, lambda: read_coco(self.needs("annotations")))

    def class_names(self) -> list[str]:
        return self.objects.categories

    def check(self, layout: BatchLayout) -> None:
        try:
            import faster_coco_eval  # noqa: F401  # measures
            import pycocotools  # noqa: F401  # rasterises polygons
        except ImportError as error:
            raise UsageError(missing_extra(error)) from None
        super().check(layout)

    @property
    def selects_images(self) -> bool:
        return True

    def choose_images(self, index: Index) -> Index:
        return super().choose_images(self.objects.choose(index))

    def check_fit(self, images: Index, validation: Index | None) -> None:
        self.objects.check(images)
        if validation is not None:
            self._evaluation_set(validation)
        super().check_fit(images, validation)

    def keep(self, images: Index) -> None:
        self.objects.keep(images)

    def build(self, index: Index) -> DetectObjects:
        self.objects.load()  # what is kept, so that no rank reads the whole JSON for the categories
        return super().build(index)

    def annotate(self, images: Index) -> Annotate:
        from data_pipeline.annotations.placing import place
        from mae_scale.tasks.row_placing import placing_of

        objects, side = self.objects.load().objects, self.recipe.model.square_side

        def seen(row: BatchPlan) -> SeenObjects:
            image, placing = int(row.sample_ids[0]), placing_of(row)
            size = {"height": int(images.height[image]), "width": int(images.width[image])}
            return SeenObjects(placing.filled, place(objects, image, placing, **size, image_size=side))

        return seen

    def initialise(self, objective: DetectObjects, index: Index) -> Origin:
        found = super().initialise(objective, index)
        return Origin(found.notes, {**found.facts, DIGEST: self.objects.load().digest()})

    def evaluators(self, context: RunContext, engine: Engine, tracker: Tracker) -> list[Evaluator]:
        root = self.recipe.data.val_root
        if root is None:
            return []
        from mae_scale.tasks.detection.validation import AveragePrecision

        index = load_index(context.out / VALIDATION, root)
        return [AveragePrecision(context, engine, tracker, from_first(lambda: self._evaluation_set(index)))]

    def workload(self, classes: int) -> Workload:
        model, section = self.planned.model, self.recipe.detecting
        size, channels, boxes = model.encoder.size, section.channels, section.sampled_boxes
        patches = (self.recipe.model.square_side // size.patch_size) ** 2
        width, masks, outputs = size.width, boxes // 4, 1 + classes
        levels = [(16 * patches, width // 4), (4 * patches, width // 2), (patches, width), (patches // 4, width)]
        pixels = sum(rows for rows, _ in levels) + patches // 16
        products = [
            (patches, width, 4 * (width // 2)),
            (4 * patches, width // 2, 4 * (width // 4)),
            (patches, width, 4 * (width // 2)),
            *((rows, inner, channels) for rows, inner in levels),
            *((rows, 9 * channels, channels) for rows, _ in levels),
            *[(pixels, 9 * channels, channels)] * 2,
            (pixels, channels, 5 * 3),
            *[(49 * boxes, 9 * channels, channels)] * 4,
            (boxes, 49 * channels, 4 * channels),
            (boxes, 4 * channels, 5 * outputs),
            *[(196 * masks, 9 * channels, channels)] * 4,
            (196 * masks, channels, 4 * channels),
            (4 * 196 * masks, channels, outputs),
        ]
        # Kept: the input of each convolution and, in the heads, of each norm, in float32; masks to learn from aside.
        of_heads = channels * (2 * pixels + 8 * 49 * boxes + 8 * 196 * masks + 2 * 4 * 196 * masks)
        return workload_of(
            self.planned,
            self.recipe,
            stacks=self.stacks(model.encoder),
            products=(self.embedding(model.encoder), *((*product, True) for product in products)),
            predicted=boxes * 5 * outputs + 784 * masks * outputs,
            kept_values=sum(rows * (inner + 3 * channels) for rows, inner in levels) + 3 * patches * width,
            kept_bytes=4 * of_heads,
        )

    def summary(self, found: dict[str, Any]) -> str:
        from mae_scale.tasks.detection.evaluate import summary

        return summary(found)

    def _evaluation_set(self, images: Index) -> DetectionSet:
        from mae_scale.tasks.detection.evaluation_set import detection_set

        limit = self.recipe.detecting.bad_annotation_limit
        return detection_set(images, self.needs("val_annotations"), categories=self.class_names(), limit=limit)
