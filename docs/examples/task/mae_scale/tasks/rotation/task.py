"""Rotation as a task: a Vision Transformer learns to tell how images were turned; it leaves its weights."""

from typing import ClassVar

import torch
from safetensors.torch import save

from data_pipeline.batch_layout import BatchLayout
from data_pipeline.errors import UsageError
from data_pipeline.files import whole_file
from data_pipeline.index import Index
from mae_scale.checkpoints.shards import ShardReader
from mae_scale.checkpoints.store import list_checkpoints, read_manifest
from mae_scale.models.build import build_model, size_of
from mae_scale.models.weights.autoencoder import to_official
from mae_scale.planning.flops import training_flops, vit_forward_macs
from mae_scale.tasks.rotation.objective import TURNS, PredictRotation
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.task import Task


class Rotation(Task[PredictRotation]):
    """Each image is turned by none to three quarters, and the encoder is trained to tell by how many."""

    command: ClassVar[str] = "pretrain"

    def check(self, layout: BatchLayout) -> None:
        """Refuse sizes that no encoder has, and what a recipe says in vain."""
        if rate := self.recipe.model.drop_path:
            raise UsageError(f"model.drop_path={rate:g}: task: rotation does not drop paths; leave it 0")
        with torch.device("meta"):
            self._objective()

    def build(self, index: Index) -> PredictRotation:
        return self._objective()

    def training_flops(self) -> int:
        model, size = self.recipe.model, size_of(self.recipe.model)
        macs = vit_forward_macs(
            image_size=model.image_size,
            patch_size=size.patch_size,
            width=size.width,
            depth=size.depth,
            num_classes=TURNS,
        )
        return training_flops(2 * macs)

    def finish(self, context: RunContext, tracker: Tracker) -> str:
        """Write the encoder as the authors' release names it, which `mae-scale finetune --weights` reads."""
        _, folder = list_checkpoints(context.checkpoints)[-1]
        model = build_model(self.recipe)
        with ShardReader(folder / name for name in read_manifest(folder)["files"]) as reader, torch.no_grad():
            for name, parameter in model.encoder.named_parameters():
                parameter.copy_(reader.whole(f"weight/encoder.{name}").view_as(parameter))
        weights = context.out / "export" / "encoder.safetensors"
        weights.parent.mkdir(exist_ok=True)
        with whole_file(weights) as file:
            file.write(save(to_official(model, decoder=False)))
        return f"weights in {weights}"

    def _objective(self) -> PredictRotation:
        model = self.recipe.model
        return PredictRotation(size_of(model), model.square_side, seed=self.recipe.seed)
