"""MoCo v3 as a task: train an encoder by contrasting two views of each image, measure k-NN, export the encoder."""

import math
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch

from data_pipeline.augment.kinds import SecondView, augmentation
from data_pipeline.batch_layout import BatchLayout
from data_pipeline.errors import UsageError
from data_pipeline.index import Index
from mae_scale.engines.base import Engine
from mae_scale.models.build import build_moco_of, size_of
from mae_scale.planning.flops import vit_forward_macs
from mae_scale.planning.workload import Stack, Workload
from mae_scale.tasks.encoder_weights import leave_weights
from mae_scale.tasks.knn_accuracy import KnnAccuracy, check_knn
from mae_scale.tasks.moco.objective import Contrast
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.self_check import Untrained
from mae_scale.training.task import Evaluator, Task
from mae_scale.training.workload import workload_of

VIEWS, AUGMENTATION = 2, "moco_v3"


class MomentumContrast(Task[Contrast]):
    """Train an encoder to tell the two views of each image from all others (Chen et al., arXiv 2104.02057)."""

    command: ClassVar[str] = "pretrain"

    @property
    def kind(self) -> str:
        return "moco"

    def check(self, layout: BatchLayout) -> None:
        data, model = self.recipe.data, self.recipe.model
        with torch.device("meta"):
            build_moco_of(self.recipe)
        if data.augmentation != AUGMENTATION:
            raise UsageError(
                f"data.augmentation={data.augmentation} makes one view of an image, and task: moco compares two; "
                f"use data.augmentation={AUGMENTATION}"
            )
        if data.random_erasing:
            raise UsageError(f"data.random_erasing={data.random_erasing:g} is not done to views of task: moco; drop it")
        if model.drop_path:
            raise UsageError(f"model.drop_path={model.drop_path:g}: task: moco does not drop paths; use 0")
        if layout.accumulation > 1:
            raise UsageError(
                f"task: moco compares each image with all others of the global batch, and takes BatchNorm's statistics "
                f"from it; this layout cuts it into {layout.accumulation} steps. Drop engine.micro_batch, and use more "
                "ranks or engine.activation_checkpointing=all if a rank's whole share does not fit"
            )
        if data.global_batch < 2:
            raise UsageError(f"data.global_batch={data.global_batch}: task: moco needs other images to compare with")

    def check_fit(self, images: Index, validation: Index | None) -> None:
        check_knn(self.recipe, images, validation)

    def second_view(self) -> SecondView:
        data = self.recipe.data
        kind = augmentation(f"{AUGMENTATION}_second", crop_scale=data.crop_scale, flip=data.flip)
        return SecondView(kind, self.recipe.model.image_size)

    def build(self, index: Index) -> Contrast:
        return self._objective()

    def _objective(self) -> Contrast:
        return Contrast(build_moco_of(self.recipe), temperature=self.recipe.contrast.temperature)

    def training_flops(self) -> int:
        """Return the FLOPs per image of both views: forward and backward, and forward in the momentum encoder.

        The frozen patch projection has no backward pass. Similarities of queries and keys are not counted.
        """
        model, section = self.recipe.model, self.recipe.contrast
        macs_of = partial(
            vit_forward_macs,
            model.name,
            image_size=model.image_size,
            patch_size=model.patch_size,
            width=model.width,
        )
        encoder, projection = macs_of(depth=model.depth), macs_of(depth=0)
        width = size_of(model).width
        projector = section.hidden * (width + section.hidden + section.dim)
        predictor = 2 * section.hidden * section.dim
        macs = 3 * (encoder - projection + projector + predictor) + projection + encoder + projector
        return 2 * VIEWS * macs

    def workload(self, classes: int) -> Workload:
        with torch.device("meta"):
            objective = self._objective()
        section, size, patches = self.recipe.contrast, objective.model.encoder.size, objective.model.encoder.patches
        width, hidden, dim = size.width, section.hidden, section.dim
        stack = Stack(VIEWS * (1 + patches), width, size.heads, size.depth, 0, sequences=VIEWS)
        projector = ((1, width, hidden), (1, hidden, hidden), (1, hidden, dim))
        predictor = ((1, dim, hidden), (1, hidden, dim))
        work = workload_of(
            objective,
            self.recipe,
            stacks=(stack, replace(stack, trained=size.depth)),
            products=(
                (2 * VIEWS * patches, 3 * size.patch_size**2, width, False),
                *((VIEWS * m, k, n, False) for m, k, n in projector),
                *((VIEWS * m, k, n, True) for m, k, n in (*projector, *predictor)),
            ),
            predicted=VIEWS * dim,
        )
        positions = objective.model.encoder.pos_embed  # the momentum encoder has its own
        return replace(work, buffer_bytes=work.buffer_bytes + positions.nbytes)

    def evaluators(self, context: RunContext, engine: Engine, tracker: Tracker) -> list[Evaluator]:
        return [] if self.recipe.tracking.knn_images is None else [KnnAccuracy(context, engine)]

    def untrained_loss(self, context: RunContext, objective: Contrast) -> Untrained | None:
        """Return 4 T ln(N), the loss when all similarities are the same, of N images in the global batch."""
        temperature, images = self.recipe.contrast.temperature, self.recipe.data.global_batch
        return Untrained(4 * temperature * math.log(images), f"4 x {temperature:g} x ln({images})", tolerance=0.01)

    def finish(self, context: RunContext, tracker: Tracker) -> str:
        return leave_weights(context, tracker, "cls", "timm")
