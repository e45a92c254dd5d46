"""Pre-training as a job: a masked autoencoder that reconstructs, drawn now and then; at the end weights."""

import torch

from data_pipeline.index import Index
from mae_scale.checkpoints.export import checkpoint_model, export_weights
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.engines.deepspeed_config import BatchLayout
from mae_scale.errors import UsageError
from mae_scale.models.build import build_model
from mae_scale.models.vit import patchify
from mae_scale.planning.flops import mae_forward_flops, training_flops
from mae_scale.tasks.mae.objective import Reconstruct
from mae_scale.tasks.mae.reconstructions import Reconstructions
from mae_scale.tracking.tracker import Tracking
from mae_scale.training.loop import Run
from mae_scale.training.run import Job
from mae_scale.training.shown_images import some_images

PCA_IMAGES = 256


class Pretraining(Job):
    """A masked autoencoder is trained to reconstruct."""

    def refuse(self, layout: BatchLayout) -> None:
        if self.recipe.classifier is not None:
            raise UsageError("the recipe trains a classifier; use `mae-scale finetune` for it")
        with torch.device("meta"):
            build_model(self.recipe)

    def check_fit(self, images: Index, validation: Index | None) -> None:
        """Accept any images: those of data.val_root are reconstructed for pictures only."""

    def objective(self, index: Index) -> Reconstruct:
        objective = Reconstruct(build_model(self.recipe), seed=self.recipe.seed)
        if self.recipe.model.target == "pca":
            # Fitted on the patches of the run's first images; the same on every rank and at every start.
            images = some_images(index, PCA_IMAGES, self.recipe, self.augmentation())
            patches = patchify(images, objective.model.patch_size)
            objective.model.target.fit(patches.flatten(0, 1))
        return objective

    def training_flops(self) -> int:
        model = self.recipe.model
        return training_flops(
            mae_forward_flops(
                model.name,
                image_size=model.image_size,
                patch_size=model.patch_size,
                width=model.width,
                depth=model.depth,
                mask_ratio=model.mask_ratio,
                decoder_width=model.decoder_width,
                decoder_depth=model.decoder_depth,
                way="encoder_mask_tokens" if model.encoder_mask_tokens else "fast",
            )
        )

    def evaluator(self, run: Run, engine, tracking: Tracking) -> Reconstructions:
        return Reconstructions(run, engine, tracking)

    def finish(self, run: Run, tracking: Tracking) -> str:
        weights = run.out / "export" / "model.safetensors"
        if not weights.exists():
            model, _ = checkpoint_model(list_checkpoints(run.checkpoints)[-1][1])
            export_weights(model, weights, "official")
        return f"weights in {weights}"
