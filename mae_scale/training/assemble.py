"""From a recipe to a model, and everything that scale asks of it, applied from outside in one order."""

import torch
from torch import nn

from mae_scale.models.classifier import Classifier, build_classifier
from mae_scale.models.mae import MaskedAutoencoder, build_mae
from mae_scale.recipe import Recipe
from mae_scale.training.activation_checkpointing import checkpoint_activations
from mae_scale.training.compilation import compile_blocks
from mae_scale.training.ds_config import BatchLayout, compiles, deepspeed_config, precision_of, zero_stage_of


def build_model(recipe: Recipe) -> MaskedAutoencoder:
    """The autoencoder of a recipe, freshly initialised from torch's generator."""
    return build_mae(**recipe.model.model_dump())


def build_classifier_of(recipe: Recipe, classes: int) -> Classifier:
    """The classifier of a recipe for so many classes, freshly initialised from torch's generator."""
    model, section = recipe.model, recipe.classifier
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
        drop_path=model.drop_path,
    )


def scale_out(objective: nn.Module, recipe: Recipe, layout: BatchLayout, device: torch.device):
    """The objective compiled, checkpointed, then sharded in its precision by the recipe's engine.

    The objective has `blocks`, `never_decayed` and a forward from a micro-batch's tensors to its mean loss.
    """
    gpu = device.type == "cuda"
    stage = zero_stage_of(recipe)
    if compiles(recipe, stage, gpu):
        compile_blocks(objective.blocks)
    checkpoint_activations(objective.blocks, recipe.engine.activation_checkpointing)
    if recipe.engine.backend == "fairscale":
        from mae_scale.training.fairscale_engine import FairScaleEngine

        precision = precision_of(recipe, gpu)
        return FairScaleEngine(objective, recipe, layout, stage=stage, precision=precision, device=device)
    from mae_scale.training.engine import DeepSpeedEngine

    return DeepSpeedEngine(objective, recipe, deepspeed_config(recipe, layout, gpu=gpu), device)
