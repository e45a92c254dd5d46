"""What detection and segmentation have in common: the encoder of whole images, its start, its work in numbers."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from data_pipeline.batch_layout import BatchLayout
from data_pipeline.index import Index
from mae_scale.checkpoints.export import (
    checkpoint_model,
    export_weights,
    grid_of_weights,
    naming,
    starting_point,
    weights_of,
)
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.config.required import required
from mae_scale.config.schema import Recipe
from mae_scale.config.task_sections import DenseSection
from mae_scale.distributed.collectives import first_then_others, from_first
from mae_scale.engines.base import Objective
from mae_scale.engines.optimizers import group_lines, parameter_groups
from mae_scale.models.dense import DenseEncoder, DenseModel
from mae_scale.models.weights.checked_copy import LoadReport
from mae_scale.models.weights.dense import load_dense
from mae_scale.planning.workload import Stack
from mae_scale.tasks.evaluation import EVALUATION
from mae_scale.tasks.starting_weights import check_start, loaded_notes, weights_to_begin_with
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.inputs import has_checkpoint, started_from
from mae_scale.training.task import Origin, Task


class DenseObjective(Objective):
    """An objective whose model has a dense encoder, with a layer for each of its blocks."""

    never_decayed = frozenset(("pos_embed",))
    model: DenseModel

    @property
    def encoder(self) -> DenseEncoder:
        """The model's encoder."""
        return self.model.encoder

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks: what is compiled, checkpointed and sharded."""
        return list(self.encoder.blocks)

    @property
    def layers(self) -> int:
        """Number of layers for layer-wise lr decay: the embedding, the blocks, and what comes after."""
        return len(self.encoder.blocks) + 2

    def layer_of(self, name: str) -> int:
        """Return the layer, from 0, of one of the objective's parameters."""
        _, model_part, encoder_part, *rest = [*name.split("."), "", ""]
        if model_part != "encoder":
            return self.layers - 1
        return 1 + int(rest[0]) if encoder_part == "blocks" else 0


DenseT = TypeVar("DenseT", bound=DenseObjective)


class DenseTransfer(Task[DenseT]):
    """A task that trains a head for places in an image, and the encoder below it, on annotated images."""

    command: ClassVar[str] = "finetune"

    @property
    def kind(self) -> str:
        return self.recipe.task

    @property
    def section(self) -> DenseSection:
        """The recipe's section of the task."""
        section = self.recipe.start
        assert isinstance(section, DenseSection)
        return section

    @cached_property
    def planned(self) -> DenseT:
        """The objective on the device "meta", for the numbers in it."""
        with torch.device("meta"):
            return self.objective(classes=self.planned_classes)

    @abstractmethod
    def objective(self, classes: int) -> DenseT:
        """Return the objective for a number of classes, initialised from torch's generator."""

    @abstractmethod
    def class_names(self) -> list[str]:
        """Return the names of the classes that the run in the task's folder is of."""

    needed: ClassVar[dict[str, str]]
    """The section's keys that name annotations, and what each is to name; those of val_... where there is val_root."""
    kept: ClassVar[str]
    """The one of these that a run keeps the content of, and does not need again."""

    def needs(self, key: str) -> Path:
        """Return one of the `needed` paths. Raises UsageError when it is not set."""
        return annotations_path(self.recipe, key, self.needed)

    def check(self, layout: BatchLayout) -> None:
        check_start(self.recipe, self.out)
        _ = self.planned  # refuses sizes that do not fit
        for key in self.needed:
            is_kept = key == self.kept and has_checkpoint(self.out)
            if not is_kept and (not key.startswith("val_") or self.recipe.data.val_root is not None):
                self.needs(key)

    def check_fit(self, images: Index, validation: Index | None) -> None:
        path = weights_to_begin_with(self.recipe, self.out)
        if path is not None:
            with torch.device("meta"):
                objective = self.objective(classes=len(self.class_names()))
            _load(objective.model, starting_point(path))

    def build(self, index: Index) -> DenseT:
        return self.objective(classes=len(self.class_names()))

    def initialise(self, objective: DenseT, index: Index) -> Origin:
        """Load the weights that the run starts from, unless it has a checkpoint. All ranks call it."""
        path, source = self.section.weights, None
        notes: list[str] = []
        if path is not None and not has_checkpoint(self.out):
            source = starting = from_first(lambda: starting_point(path))
            loaded = first_then_others(lambda: _load(objective.model, starting))
            notes = loaded_notes(loaded, path, source, takes_beit=objective.encoder.pos_embed is None)
        is_first = torch.distributed.get_rank() == 0
        return Origin(
            notes,
            {"classes": self.class_names(), "started_from": started_from(self.out, source) if is_first else None},
        )

    def number_of_classes(self, images: Index) -> int:
        return len(self.class_names())

    def training_flops(self) -> int:
        work = self.workload(self.planned_classes)
        return work.forward_flops + work.backward_flops

    def stacks(self, encoder: DenseEncoder) -> tuple[Stack, ...]:
        """Return the encoder's blocks: those over the whole image, and those in windows, filled up to whole ones."""
        size, side = encoder.size, self.recipe.model.square_side // encoder.size.patch_size
        window, scaled = self.section.window, encoder.pos_embed is None
        whole = size.depth if window is None else self.section.global_blocks
        found = [Stack(side**2, size.width, size.heads, whole, whole, scaled=scaled)]
        if window is not None and whole < size.depth:
            count, rest = (-(-side // window)) ** 2, size.depth - whole
            tokens = count * window**2
            found.append(Stack(tokens, size.width, size.heads, rest, rest, scaled=scaled, sequences=count))
        return tuple(found)

    def embedding(self, encoder: DenseEncoder) -> tuple[int, int, int, bool]:
        """Return (rows per image, inner, outer, trained) of the patches' embedding."""
        size = encoder.size
        return (self.recipe.model.square_side // size.patch_size) ** 2, 3 * size.patch_size**2, size.width, True

    def describe(self, objective: DenseT) -> list[str]:
        """Return what is trained, and with layer-wise decay each layer's share of the learning rate."""
        groups = parameter_groups(objective, self.recipe.optim)
        trained = sum(p.numel() for group in groups for p in group["params"])
        said = [f"{trained:,} parameters are trained, for {len(self.class_names())} classes"]
        if self.recipe.optim.layer_decay < 1:
            said += group_lines(groups)
        return said

    @abstractmethod
    def summary(self, found: dict[str, Any]) -> str:
        """Return the numbers of the last evaluation that papers give."""

    def finish(self, context: RunContext, tracker: Tracker) -> str:
        """Write export/model.safetensors of the last checkpoint, by our own names."""
        weights = context.out / "export" / "model.safetensors"
        if not weights.exists():
            model, _ = checkpoint_model(list_checkpoints(context.checkpoints)[-1][1])
            export_weights(model, weights, "safetensors")
        said = f"weights in {weights}"
        if self.recipe.data.val_root is not None and (context.out / EVALUATION).exists():
            said = f"{self.summary(json.loads((context.out / EVALUATION).read_text()))}; {said}"
        return said


def annotations_path(recipe: Recipe, key: str, needed: Mapping[str, str]) -> Path:
    """Return a path of the task's section. Raises UsageError, with what `needed` says of it, when it is not set."""
    name, found = f"{recipe.task}.{key}", getattr(recipe.start, key)
    return required(found, name, f"add {name}={needed[key]}")


def _load(model: DenseModel, source: Path) -> LoadReport:
    """Load the weights of a file or a checkpoint. Raises UsageError when they do not fit."""
    state, grid = weights_of(source), grid_of_weights(source)
    with naming(source):
        return load_dense(model, state, grid)
