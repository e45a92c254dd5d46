"""`mae-scale reconstruct`: what an autoencoder makes of removed patches; ours or a published one with its decoder."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.augmentations import augmentation
from data_pipeline.index import open_index
from mae_scale.checkpoints.export import checkpoint_model, find_checkpoint
from mae_scale.config.schema import Recipe
from mae_scale.errors import UsageError
from mae_scale.models.build import build_model
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.weights.autoencoder import load_hf, load_official, read_weights
from mae_scale.tasks.mae.reconstructions import IMAGES, draw_reconstructions
from mae_scale.training.shown_images import some_images


def reconstruct(recipe: Recipe, weights: Path, picture: Path) -> None:
    """Draw some images of data.val_root, masked and reconstructed, as a PNG.

    weights: a pre-training run's folder, a checkpoint, or a file with a decoder in the authors' (mae_visualize_*) or
    Hugging Face's layout, for the recipe's model. Raises UsageError for anything else.
    """
    if recipe.classifier is not None:
        raise UsageError("the recipe trains a classifier, which reconstructs nothing; give a pretrain/... recipe")
    root = recipe.data.val_root
    if root is None:
        raise UsageError("data.val_root is not set; add data.val_root=/path/to/images")
    if picture.suffix != ".png":
        raise UsageError(f"--out {picture}: expected a name that ends in .png")
    model = build_model(recipe)
    if weights.is_dir():
        model, recipe = checkpoint_model(find_checkpoint(weights))
        if not isinstance(model, MaskedAutoencoder):
            raise UsageError(f"--weights {weights} is a classifier's run; give one of pre-training, with a decoder")
    else:
        state = read_weights(weights)
        load = load_hf if any(key.startswith("vit.") for key in state) else load_official
        missing = [name for name in load(model, state).not_set if not name.startswith("target.")]
        if missing:
            raise UsageError(
                f"--weights {weights} has no decoder ({len(missing)} tensors are missing, such as {missing[0]}); "
                "give a file with one, such as the authors' mae_visualize_*, or a pre-training run's folder"
            )
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        images = some_images(open_index(root, progress=False), IMAGES, recipe, augmentation("evaluation"))
        draw_reconstructions(model, recipe, images, picture)
    except OSError as error:
        raise UsageError(f"--out {picture} cannot be written: {error.strerror}") from None
