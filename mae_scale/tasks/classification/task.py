"""Classification as a task: fine-tuning, partial fine-tuning, linear probing, supervised from scratch."""

import json
import math
from functools import cache, partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from data_pipeline.batch_layout import BatchLayout
from data_pipeline.errors import UsageError
from data_pipeline.index import Index, load_index
from mae_scale.checkpoints.export import checkpoint_model, export_weights, starting_point
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.config.schema import Recipe
from mae_scale.engines.base import Engine
from mae_scale.engines.optimizers import group_lines, parameter_groups
from mae_scale.models.attention import last_attention
from mae_scale.models.beit import BeitEncoder
from mae_scale.models.build import build_classifier_of
from mae_scale.models.classifier import Classifier
from mae_scale.planning.flops import vit_forward_macs
from mae_scale.planning.workload import Stack, Workload
from mae_scale.reports.classification import attention_figure, per_class_figure
from mae_scale.reports.style import pictures_of
from mae_scale.tasks.classification.datasets import folder_set, refuse_unlabelled
from mae_scale.tasks.classification.objective import Classify
from mae_scale.tasks.classification.starting_weights import initialise, load_weights
from mae_scale.tasks.classification.validation import EVALUATION, Validation
from mae_scale.tasks.starting_weights import check_start, weights_to_begin_with
from mae_scale.tracking.mlflow_models import ServedClassifier, keep_model
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.inputs import VALIDATION
from mae_scale.training.self_check import Untrained
from mae_scale.training.shown_images import shown_images
from mae_scale.training.task import Evaluator, Origin, Task
from mae_scale.training.workload import workload_of

FIGURE_IMAGES = 8


class Classification(Task[Classify]):
    """Train a classifier, or a part of it, on labels."""

    command: ClassVar[str] = "finetune"

    @property
    def kind(self) -> str:
        section = self.recipe.classification
        if section.from_scratch:
            return "scratch"
        if section.trained_blocks is None:
            return "finetune"
        return "partial" if section.trained_blocks else "probe"

    def check(self, layout: BatchLayout) -> None:
        section = self.recipe.classification
        with torch.device("meta"):
            build_classifier_of(self.recipe, 2)
        check_start(self.recipe, self.out)
        if (section.mixup or section.cutmix) and layout.micro_batch % 2:
            raise UsageError(
                f"mixup and cutmix mix neighbours, and a rank's micro-batch is {layout.micro_batch} images; "
                "choose an even engine.micro_batch (or data.global_batch), or classifier.mixup=0 classifier.cutmix=0"
            )
        if section.batch_norm and layout.accumulation > 1:
            raise UsageError(
                f"classifier.batch_norm takes its statistics from the whole global batch, and this layout cuts it into "
                f"{layout.accumulation} steps; drop engine.micro_batch: a frozen encoder keeps nothing for a backward "
                "pass, so a rank's whole share fits"
            )

    def choose_images(self, index: Index) -> Index:
        refuse_unlabelled(index)
        labels = self.recipe.data.labels_per_class
        return super().choose_images(index) if labels is None else index.few(labels, seed=self.recipe.seed)

    def check_fit(self, images: Index, validation: Index | None) -> None:
        if validation is not None:
            folder_set(validation, num_classes=len(images.classes), class_names=images.classes)
        path = weights_to_begin_with(self.recipe, self.out)
        if path is not None:
            with torch.device("meta"):
                model = build_classifier_of(self.recipe, len(images.classes))
            load_weights(model, starting_point(path))

    def build(self, index: Index) -> Classify:
        model = build_classifier_of(self.recipe, len(index.classes))
        return Classify(model, self.recipe.classification, seed=self.recipe.seed)

    def initialise(self, objective: Classify, index: Index) -> Origin:
        return initialise(objective.model, self.recipe, self.out, classes=index.classes)

    def training_flops(self) -> int:
        """Return the FLOPs per image; a frozen part has no backward pass (He et al., partial fine-tuning)."""
        model, trained = self.recipe.model, self.recipe.classification.trained_blocks
        macs = partial(
            vit_forward_macs,
            model.name,
            image_size=model.image_size,
            patch_size=model.patch_size,
            width=model.width,
        )
        whole = macs(depth=model.depth)
        if trained is None:
            return 2 * 3 * whole
        with torch.device("meta"):
            depth = len(build_classifier_of(self.recipe, 2).encoder.blocks)
        none = macs(depth=0)
        return int(2 * (whole + 2 * (whole - none) * trained / depth))

    def workload(self, classes: int) -> Workload:
        with torch.device("meta"):
            model = build_classifier_of(self.recipe, classes)
        size, patches = model.encoder.size, model.encoder.patches
        trained = size.depth if model.trained_blocks is None else model.trained_blocks
        return workload_of(
            Classify(model, self.recipe.classification, seed=self.recipe.seed),
            self.recipe,
            stacks=(
                Stack(
                    1 + patches,
                    size.width,
                    size.heads,
                    size.depth,
                    trained,
                    scaled=isinstance(model.encoder, BeitEncoder),
                ),
            ),
            products=(
                (patches, 3 * size.patch_size**2, size.width, model.trained_blocks is None),
                (1, size.width, classes, True),
            ),
            predicted=classes,
        )

    def describe(self, objective: Classify) -> list[str]:
        """Return what is trained, and with layer-wise decay each layer's share of the learning rate."""
        total = sum(p.numel() for p in objective.parameters())
        groups = parameter_groups(objective, self.recipe.optim)
        trained = sum(p.numel() for group in groups for p in group["params"])
        said = [f"{trained:,} of {total:,} parameters are trained, for {objective.model.classes} classes"]
        if self.recipe.optim.layer_decay < 1:
            said += group_lines(groups)
        return said

    def evaluators(self, context: RunContext, engine: Engine, tracker: Tracker) -> list[Evaluator]:
        root, classes = context.recipe.data.val_root, context.index.classes
        if root is None:
            return []
        validation = load_index(context.out / VALIDATION, root)
        return [Validation(context, engine, folder_set(validation, num_classes=len(classes), class_names=classes))]

    def untrained_loss(self, context: RunContext, objective: Classify) -> Untrained | None:
        """Return ln(classes), the cross-entropy of guessing, also of smoothed and mixed labels."""
        classes = objective.model.classes
        return Untrained(math.log(classes), f"ln({classes})", tolerance=0)

    def finish(self, context: RunContext, tracker: Tracker) -> str:
        weights = context.out / "export" / "model.safetensors"
        trained = cache(lambda: _trained_classifier(context))
        if not weights.exists():
            for picture in draw_figures(trained(), context):
                tracker.artifact(picture, "figures")
            export_weights(trained(), weights, "official")
        if tracker.mlflow is not None:
            keep_model(
                tracker.mlflow,
                context.out,
                lambda: (ServedClassifier(trained()), np.rint(255 * pictures_of(shown_images(context, 1)))),
                metadata={"class_names": list(context.index.classes)},
                registered_name=self.recipe.tracking.registered_model,
            )
        said = f"weights in {weights}"
        if (context.out / EVALUATION).exists():
            found = json.loads((context.out / EVALUATION).read_text())
            said = f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} % of {found['images']:,} images; {said}"
        return said


def _trained_classifier(context: RunContext) -> Classifier:
    model, _ = checkpoint_model(list_checkpoints(context.checkpoints)[-1][1])
    assert isinstance(model, Classifier)
    return model


def refuse_more_than_head(recipe: Recipe) -> None:
    """Raise UsageError when a recipe for linear probing trains more than the head."""
    if recipe.classification.trained_blocks != 0:
        raise UsageError(
            "linear probing trains the head alone (classifier.trained_blocks=0), and the recipe trains more; "
            "use a recipe such as probe/vit_large, or `mae-scale finetune`"
        )


def draw_figures(model: Classifier, context: RunContext) -> list[Path]:
    """Draw the attention, and the accuracy per class where it was measured; return the figures' files."""
    figures = context.out / "figures"
    pictures = [figures / "attention.png"]
    images = shown_images(context, FIGURE_IMAGES)
    attention_figure(images, last_attention(model, images), pictures[0], model.patch_size)
    if (context.out / EVALUATION).exists():
        pictures.append(figures / "per_class.png")
        per_class_figure(json.loads((context.out / EVALUATION).read_text()), pictures[1])
    return pictures
