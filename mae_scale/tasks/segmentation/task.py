"""Segmentation as a task: UperNet on the encoder, for the class of each pixel."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from data_pipeline.annotations.label_maps import place_labels
from data_pipeline.arrays import Uint8Array
from data_pipeline.batch_layout import BatchLayout
from data_pipeline.batches import Annotate
from data_pipeline.errors import UsageError
from data_pipeline.index import Index, load_index
from data_pipeline.plan import BatchPlan
from mae_scale.engines.base import Engine
from mae_scale.models.build import build_segmenter
from mae_scale.planning.workload import CROSS_ENTROPY, Workload
from mae_scale.tasks.dense_transfer import DenseTransfer
from mae_scale.tasks.segmentation.label_files import LABELS, NEEDED, LabelFiles, class_names, keep_class_names
from mae_scale.tasks.segmentation.objective import LabelPixels
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.inputs import VALIDATION
from mae_scale.training.task import Evaluator, Origin
from mae_scale.training.workload import workload_of


class Segmentation(DenseTransfer[LabelPixels]):
    """Train UperNet (Xiao et al., arXiv 1807.10221) as MAE and BEiT do on ADE20K."""

    planned_images: ClassVar[int] = 20_210  # ADE20K's
    planned_classes: ClassVar[int] = 150
    needed: ClassVar[dict[str, str]] = NEEDED

    def objective(self, classes: int) -> LabelPixels:
        return LabelPixels(build_segmenter(self.recipe, classes), seed=self.recipe.seed)

    kept: ClassVar[str] = "class_names"

    @cached_property
    def _names(self) -> list[str]:
        return class_names(self.recipe, self.out)

    def class_names(self) -> list[str]:
        return self._names

    def check(self, layout: BatchLayout) -> None:
        super().check(layout)
        depth, after = len(self.planned.encoder.blocks), self.recipe.segmenting.maps_after
        if list(after) != sorted(set(after)) or after[0] < 0 or after[-1] >= depth:
            raise UsageError(
                f"segmentation.maps_after={list(after)}; expected four blocks, from 0, in rising order, of the {depth}"
            )
        if layout.accumulation > 1:
            raise UsageError(
                "UperNet's BatchNorm takes its statistics from the whole global batch, and this layout cuts it into "
                f"{layout.accumulation} steps; drop engine.micro_batch, or use more ranks"
            )

    def check_fit(self, images: Index, validation: Index | None) -> None:
        self._training_labels(images).refuse_others(self.recipe, self.out)
        if validation is not None:
            self._validation_labels(validation)
        super().check_fit(images, validation)

    def initialise(self, objective: LabelPixels, index: Index) -> Origin:
        found = super().initialise(objective, index)
        is_first = torch.distributed.get_rank() == 0
        return Origin(found.notes, {**found.facts, LABELS: self._training_labels(index).digest() if is_first else None})

    def keep(self, images: Index) -> None:
        keep_class_names(self.class_names(), self.out)

    def annotate(self, images: Index) -> Annotate:
        from mae_scale.tasks.row_placing import placing_of

        labels, side = self._training_labels(images), self.recipe.model.square_side

        def placed(row: BatchPlan) -> Uint8Array:
            return place_labels(labels.read(int(row.sample_ids[0])), placing_of(row), side)

        return placed

    def evaluators(self, context: RunContext, engine: Engine, tracker: Tracker) -> list[Evaluator]:
        root = self.recipe.data.val_root
        if root is None:
            return []
        from mae_scale.tasks.segmentation.validation import MeanIntersection

        validation = load_index(context.out / VALIDATION, root)
        return [
            MeanIntersection(
                context, engine, tracker, validation, self._validation_labels(validation), self.class_names()
            )
        ]

    def workload(self, classes: int) -> Workload:
        model, section = self.planned.model, self.recipe.segmenting
        size, channels = model.encoder.size, section.channels
        patches, width, outputs = (self.recipe.model.square_side // size.patch_size) ** 2, size.width, classes
        levels = [16 * patches, 4 * patches, patches]
        products = [
            *[(patches, width, 4 * width)] * 2,
            (4 * patches, width, 4 * width),
            (patches // 4, 9 * (width + 4 * channels), channels),
            *((rows, width, channels) for rows in levels),
            *((rows, 9 * channels, channels) for rows in levels),
            (levels[0], 9 * 4 * channels, channels),
            (levels[0], channels, outputs),
            (patches, 9 * width, section.auxiliary_channels),
            (patches, section.auxiliary_channels, outputs),
        ]
        # Kept: the input of each convolution, norm and ReLU; the norms' in float32.
        kept = sum(rows * (width + 5 * channels) for rows in levels) + levels[0] * 7 * channels
        work = workload_of(
            self.planned,
            self.recipe,
            stacks=self.stacks(model.encoder),
            products=(self.embedding(model.encoder), *((*product, True) for product in products)),
            predicted=2 * outputs * self.recipe.model.square_side**2,
            kept_values=kept,
        )
        return replace(work, loss=CROSS_ENTROPY)

    def summary(self, found: dict[str, Any]) -> str:
        from mae_scale.tasks.segmentation.evaluate import summary

        return summary(found)

    def _training_labels(self, images: Index) -> LabelFiles:
        return LabelFiles(images, self.needs("labels"), classes=len(self.class_names()))

    def _validation_labels(self, images: Index) -> LabelFiles:
        return LabelFiles(images, self.needs("val_labels"), classes=len(self.class_names()))
