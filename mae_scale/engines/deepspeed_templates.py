"""DeepSpeed configuration files: those of ds_configs/, or the user's own."""

import json
from pathlib import Path
from typing import Any

from data_pipeline.json_object import read_object
from mae_scale.config.schema import Recipe
from mae_scale.packaged import packaged


def zero_stage_of(recipe: Recipe) -> int:
    """Return the ZeRO stage: that of engine.config where there is one, else engine.zero_stage."""
    if recipe.engine.config is None:
        return recipe.engine.zero_stage
    config, _ = read_template(recipe)
    return int(config.get("zero_optimization", {}).get("stage", 0))


def read_template(recipe: Recipe) -> tuple[dict[str, Any], str]:
    """Return the configuration that a recipe starts from, and its name for errors.

    Raises UsageError when engine.config cannot be read or is not a JSON object.
    """
    engine = recipe.engine
    if engine.config is None:
        name = "zero3_offload" if engine.offload else f"zero{engine.zero_stage}"
        return json.loads((packaged("ds_configs") / f"{name}.json").read_text()), name
    path = Path(engine.config)
    source = f"engine.config={path}"
    return read_object(path, source), source
