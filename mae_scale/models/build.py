"""From a recipe to its model, with initial weights."""

from mae_scale.config.schema import ModelSection, Recipe
from mae_scale.models.beit import Beit
from mae_scale.models.classifier import Classifier, build_classifier
from mae_scale.models.mae import MaskedAutoencoder, build_mae
from mae_scale.models.moco import Moco, build_moco
from mae_scale.models.vit import ViTSize, grid_shape, resolve_size


def size_of(model: ModelSection) -> ViTSize:
    """Return the size of a recipe's encoder: that of its name, with the recipe's own values in place."""
    return resolve_size(
        model.name, patch_size=model.patch_size, width=model.width, depth=model.depth, heads=model.heads
    )


def patch_grid(model: ModelSection) -> tuple[int, int]:
    """Return the rows and columns of patches of a recipe's images. Raises UsageError when patches do not fit."""
    return grid_shape(model.image_size, size_of(model).patch_size)


def build_model(recipe: Recipe, words: int = 2) -> MaskedAutoencoder:
    """Return the autoencoder of a recipe, initialised from torch's generator; words: of its tokeniser, if any."""
    return build_mae(**recipe.model.model_dump(exclude={"encoder", "layer_scale"}), words=words)


def build_beit(recipe: Recipe, words: int) -> Beit:
    """Return the BEiT of a recipe, initialised from torch's generator; words: of its tokeniser, where it has one."""
    model = recipe.model
    assert model.layer_scale is not None  # config.hints
    return Beit(
        size_of(model),
        image_size=model.image_size,
        layer_scale=model.layer_scale,
        mask_ratio=model.mask_ratio,
        masking=model.masking,
        target=model.target,
        words=words,
        drop_path=model.drop_path,
    )


def build_classifier_of(recipe: Recipe, classes: int) -> Classifier:
    """Return the classifier of a recipe, initialised from torch's generator."""
    model, section = recipe.model, recipe.classification
    return build_classifier(
        model.name,
        classes=classes,
        image_size=model.image_size,
        patch_size=model.patch_size,
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        pool=section.pool,
        batch_norm=section.batch_norm,
        trained_blocks=section.trained_blocks,
        layer_scale=model.layer_scale,
        drop_path=model.drop_path,
    )


def build_moco_of(recipe: Recipe) -> Moco:
    """Return the trained part of MoCo v3 of a recipe, initialised from torch's generator."""
    model, section = recipe.model, recipe.contrast
    return build_moco(
        model.name,
        image_size=model.image_size,
        patch_size=model.patch_size,
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        hidden=section.hidden,
        dim=section.dim,
    )
