"""Sizes that the benchmarks train, as arguments of build_mae, as a recipe, and their arithmetic."""

from mae_scale.config.load import load_recipe
from mae_scale.config.schema import Recipe
from mae_scale.planning.flops import mae_forward_flops, training_flops

SIZES = {
    "tiny": {"image_size": 32, "patch_size": 4, "width": 64, "depth": 2, "heads": 2}
    | {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2},
    "small": {"image_size": 64, "patch_size": 8, "width": 192, "depth": 4, "heads": 3}
    | {"decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4},
    "narrow": {"patch_size": 16, "width": 128, "depth": 24, "heads": 2}
    | {"decoder_width": 64, "decoder_depth": 8, "decoder_heads": 2},
    "base": {"name": "vit_base_patch16"},
    "large": {"name": "vit_large_patch16"},
    "huge": {"name": "vit_huge_patch14"},
}


def recipe_of(model: dict, *overrides: str) -> Recipe:
    """Return the paper's pre-training recipe for arguments of build_mae, with `section.key=value` overrides."""
    keys = {"name": None} | model
    return load_recipe("pretrain/vit_large_800ep", [*(f"model.{k}={v or 'null'}" for k, v in keys.items()), *overrides])


def training_flops_per_image(model: dict, way: str) -> int:
    """Return the FLOPs of forward and backward; way as in mae_forward_flops."""
    counted = {key: value for key, value in model.items() if key not in ("heads", "decoder_heads")}
    counted.pop("encoder_mask_tokens", None)
    return training_flops(mae_forward_flops(**counted, way=way))
