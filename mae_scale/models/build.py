"""From a recipe to its model, with initial weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_pipeline.errors import UsageError
from mae_scale.config.schema import Recipe
from mae_scale.config.sections import ModelSection
from mae_scale.config.task_sections import DenseSection
from mae_scale.models.beit import Beit
from mae_scale.models.classifier import Classifier, build_classifier
from mae_scale.models.dense import DenseEncoder, evenly_placed
from mae_scale.models.mae import MaskedAutoencoder, build_mae
from mae_scale.models.moco import Moco, build_moco
from mae_scale.models.vit import ViTSize, grid_shape, resolve_size

if TYPE_CHECKING:
    from mae_scale.models.detector import MaskRcnn
    from mae_scale.models.segmenter import Segmenter


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


def build_dense_encoder(model: ModelSection, section: DenseSection) -> DenseEncoder:
    """Return the encoder of a detector or a segmenter, initialised from torch's generator."""
    size = size_of(model)
    places = range(size.depth) if section.window is None else evenly_placed(size.depth, section.global_blocks)
    return DenseEncoder(
        size,
        image_size=(model.square_side, model.square_side),
        pretraining_size=section.pretraining_size,
        window=section.window or 1,  # without windows no block takes it
        global_blocks=places,
        drop_path=model.drop_path,
        layer_scale=model.layer_scale,
    )


def build_detector(recipe: Recipe, classes: int) -> MaskRcnn:
    """Return the Mask R-CNN of a recipe, initialised from torch's generator."""
    from mae_scale.models.detector import MaskRcnn

    section = recipe.detecting
    encoder = build_dense_encoder(recipe.model, section)
    return MaskRcnn(
        encoder,
        classes=classes,
        channels=section.channels,
        proposals=section.proposals,
        sampled_boxes=section.sampled_boxes,
    )


def build_segmenter(recipe: Recipe, classes: int) -> Segmenter:
    """Return the UperNet of a recipe, initialised from torch's generator. Raises UsageError without transformers."""
    try:
        from mae_scale.models.segmenter import Segmenter
    except ImportError as error:
        raise UsageError(missing_extra(error)) from None
    section = recipe.segmenting
    return Segmenter(
        build_dense_encoder(recipe.model, section),
        classes=classes,
        after=section.maps_after,
        channels=section.channels,
        auxiliary_channels=section.auxiliary_channels,
    )


def missing_extra(error: ImportError) -> str:
    """Return the line about a library of the extra `dense` that is not installed."""
    return f"{error.name or error} is not installed; detection and segmentation need `pip install mae-scale[dense]`"
