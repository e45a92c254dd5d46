"""From an objective to an engine: compilation, activation checkpointing, sharding and precision, in that order."""

import torch

from data_pipeline.batch_layout import BatchLayout
from mae_scale.config.schema import Recipe
from mae_scale.engines.activation_checkpointing import checkpoint_activations
from mae_scale.engines.base import Engine, Objective
from mae_scale.engines.compilation import compile_blocks
from mae_scale.engines.deepspeed_config import deepspeed_config
from mae_scale.engines.deepspeed_templates import zero_stage_of
from mae_scale.engines.policy import compiles, precision_of


def scale_out(objective: Objective, recipe: Recipe, layout: BatchLayout, device: torch.device) -> Engine:
    """Return the objective compiled, checkpointed, then sharded in its precision by the recipe's engine."""
    gpu = device.type == "cuda"
    stage = zero_stage_of(recipe)
    if compiles(recipe, stage, gpu):
        compile_blocks([*objective.blocks, *objective.untrained_blocks])
    checkpoint_activations(objective.blocks, recipe.engine.activation_checkpointing)
    if recipe.engine.backend == "fairscale":
        from mae_scale.engines.fairscale import FairScaleEngine

        precision = precision_of(recipe, gpu)
        return FairScaleEngine(objective, recipe, layout, stage=stage, precision=precision, device=device)
    from mae_scale.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(objective, recipe, deepspeed_config(recipe, layout, gpu=gpu), device)
