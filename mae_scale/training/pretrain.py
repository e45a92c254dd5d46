"""Pre-training as a job: a masked autoencoder that reconstructs; at the end weights and reconstructions."""

from pathlib import Path

import numpy as np
import torch

from data_pipeline.augmentations import Augmentation, augmentation
from data_pipeline.index import Index, open_index
from data_pipeline.loader import ImageLoader
from mae_scale.checkpoints.export import checkpoint_model, export_weights
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.errors import UsageError
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.vit import patchify
from mae_scale.objectives.reconstruct import Reconstruct
from mae_scale.planning.flops import mae_forward_flops, training_flops
from mae_scale.recipe import Recipe
from mae_scale.tracking.figures import reconstruction_figure
from mae_scale.tracking.run import Tracking
from mae_scale.training.assemble import build_model
from mae_scale.training.ds_config import BatchLayout
from mae_scale.training.job import Job
from mae_scale.training.loop import Run

FIGURE_IMAGES = 16
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

    def finish(self, run: Run, tracking: Tracking) -> str:
        weights = run.out / "export" / "model.safetensors"
        if not weights.exists():
            model, _ = checkpoint_model(list_checkpoints(run.checkpoints)[-1][1])
            picture = run.out / "figures" / "reconstructions.png"
            root = run.recipe.data.val_root
            index = run.index if root is None else open_index(root, progress=False)
            draw_reconstructions(model, run.recipe, index, picture)
            tracking.artifact(picture, "figures")
            export_weights(model, weights, "official")
        return f"weights in {weights}"


def some_images(index: Index, count: int, recipe: Recipe, kind: Augmentation) -> torch.Tensor:
    """Up to `count` images [N, 3, S, S] float32 drawn by the recipe's seed, decoded on the CPU."""
    count = min(count, len(index))
    with ImageLoader(
        index,
        kind,
        image_size=recipe.model.image_size,
        global_batch=count,
        micro_batch=count,
        seed=recipe.seed,
        device="cpu",
        stop_step=1,
    ) as loader:
        return next(iter(loader)).images


def draw_reconstructions(model: MaskedAutoencoder, recipe: Recipe, index: Index, path: Path) -> None:
    """Original, masked and reconstructed: some images of an index, cut as in evaluation."""
    images = some_images(index, FIGURE_IMAGES, recipe, augmentation("evaluation"))
    noise = Reconstruct(model, seed=recipe.seed).noise("figure", 0, np.arange(len(images)))
    with torch.inference_mode():
        output = model(images, noise)
        patches = patchify(images, model.patch_size)
        pixels = model.target.to_pixels(output.prediction, patches)
    reconstruction_figure(images, output.mask, pixels, path, patch_size=model.patch_size)
