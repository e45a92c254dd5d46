"""Figures of an autoencoder's reconstructions: during training, and by `mae-scale reconstruct`."""

from pathlib import Path

import numpy as np
import torch

from data_pipeline.augment.kinds import augmentation
from data_pipeline.errors import UsageError
from data_pipeline.index_build import open_index
from mae_scale.checkpoints.export import checkpoint_model, find_checkpoint, naming
from mae_scale.config.required import required
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import first_then_others
from mae_scale.engines.base import Engine
from mae_scale.models.build import build_model
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.weights.autoencoder import load_hf, load_official
from mae_scale.models.weights.files import read_weights
from mae_scale.reports.pretraining import reconstruction_figure
from mae_scale.tasks.mae.objective import Reconstruct
from mae_scale.tasks.step_figures import StepFigures
from mae_scale.tracking.tracker import Tracker
from mae_scale.training.context import RunContext
from mae_scale.training.shown_images import shown_images, some_images

IMAGES = 16


class Reconstructions:
    """An evaluator that draws images, what of them is visible, and their reconstructions (StepFigures).

    All ranks reconstruct, for each may hold a part of the weights; rank 0 draws.
    """

    def __init__(self, context: RunContext, engine: Engine, tracker: Tracker, objective: Reconstruct):
        """Read the images to draw. All ranks make one; an error in reading is raised on all of them.

        objective: draws the masks; its weights are not used.
        """
        self._context, self._engine, self._figures = context, engine, StepFigures(context, tracker)
        self._images = first_then_others(lambda: shown_images(context, IMAGES))
        self._noise = fixed_noise(objective, len(self._images))

    def due(self, done: int) -> bool:
        return self._figures.due(done)

    def __call__(self, done: int) -> dict[str, float]:
        mask, pixels = self._reconstruct()

        def paint(path: Path, title: str) -> None:
            side = round((pixels.shape[-1] / 3) ** 0.5)
            reconstruction_figure(self._images, mask, pixels, path, patch_size=side, title=title)

        if self._context.ranks.is_first:
            self._figures.draw(done, paint)
        return {}

    def _reconstruct(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mask [N, L] and pixels [N, L, p*p*3] of all images, on the host, computed in micro-batches."""
        device, size = self._context.device, self._context.layout.micro_batch
        masks, pixels = [], []
        # Eager: these few images must not make compiled blocks be compiled again.
        with torch.compiler.set_stance("force_eager"):
            for part in zip(self._images.split(size), self._noise.split(size), strict=True):
                _, mask, predicted = self._engine.predict(*(tensor.to(device) for tensor in part))
                masks.append(mask.cpu())
                pixels.append(predicted.cpu())
        return torch.cat(masks), torch.cat(pixels)


def fixed_noise(objective: Reconstruct, count: int) -> torch.Tensor:
    """Return mask noise [count, L] on the host, the same at every call of a run."""
    return objective.noise("figure", 0, np.arange(count))


def draw_reconstructions(model: MaskedAutoencoder, recipe: Recipe, images: torch.Tensor, path: Path) -> None:
    """Draw images [N, 3, H, W] as original, masked and reconstructed by a model on the host."""
    objective = Reconstruct(model, seed=recipe.seed).eval()
    with torch.inference_mode():
        _, mask, pixels = objective(images, fixed_noise(objective, len(images)))
    reconstruction_figure(images, mask, pixels, path, patch_size=model.patch_size)


def reconstruct(recipe: Recipe, weights: Path, picture: Path) -> None:
    """Draw some images of data.val_root, masked and reconstructed, as a PNG.

    weights: a pre-training run's folder, a checkpoint, or a file with a decoder in the authors' (mae_visualize_*) or
    Hugging Face's layout, for the recipe's model. Raises UsageError for anything else.
    """
    if recipe.task != "mae":
        raise UsageError(f"the recipe's task is {recipe.task}, without a decoder of pixels; give a recipe of task mae")
    root = required(recipe.data.val_root, "data.val_root", "add data.val_root=/path/to/images")
    if picture.suffix != ".png":
        raise UsageError(f"--out {picture}: expected a name that ends in .png")
    model = build_model(recipe)
    if weights.is_dir():
        found, recipe = checkpoint_model(find_checkpoint(weights))
        if not isinstance(found, MaskedAutoencoder):
            raise UsageError(
                f"--weights {weights} is of a run of task {recipe.task}, without a decoder of pixels; "
                "give one of task mae"
            )
        model = found
    else:
        state = read_weights(weights)
        load = load_hf if any(key.startswith("vit.") for key in state) else load_official
        with naming(weights):
            loaded = load(model, state)
        missing = [name for name in loaded.not_set if not name.startswith("target.")]
        if missing:
            raise UsageError(
                f"--weights {weights} has no decoder ({len(missing)} tensors are missing, such as {missing[0]}); "
                "give a file with one, such as the authors' mae_visualize_*, or a pre-training run's folder"
            )
    if model.predicts_words:
        raise UsageError(
            f"--weights {weights} predict the words of a tokeniser, and no pixels; give those of another model.target"
        )
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        images = some_images(open_index(root, progress=False), IMAGES, recipe, augmentation("evaluation"))
        draw_reconstructions(model, recipe, images, picture)
    except OSError as error:
        raise UsageError(f"--out {picture} cannot be written: {error.strerror}") from None
