"""Copying weights into a model, after a strict check: whatever is missing, left over or of another shape is listed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from data_pipeline.errors import UsageError
from mae_scale.models.vit import SIZES, ViTSize
from mae_scale.models.weights.files import StateDict


@dataclass
class LoadReport:
    """Result of a load: our names that were set, our names the file does not have, the file's names not copied."""

    loaded: list[str]
    not_set: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def check_size(given: StateDict, size: ViTSize) -> None:
    """Raise UsageError when the file (release names) is of another patch, width or depth; heads leave no trace."""
    weight = given.get("patch_embed.proj.weight")
    blocks = [int(key.split(".")[1]) for key in given if re.match(r"blocks\.\d+\.", key)]
    if weight is None or weight.ndim != 4 or not blocks:
        return  # not weights of a ViT: what is missing is found and listed later
    found = (weight.shape[-1], weight.shape[0], max(blocks) + 1)
    expected = (size.patch_size, size.width, size.depth)
    if found != expected:
        raise UsageError(
            f"these are weights of {_size_text(*found)}, this recipe's model is {_size_text(*expected)}: "
            "give weights of this model, or give the recipe the file's model"
        )


def check_same(given: StateDict, expected: StateDict, *, layout: str, advice: str) -> None:
    """Raise UsageError, ending in the advice, that lists unexpected keys (release names) and shapes."""
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    wrong = [
        f"{key} is {list(given[key].shape)}, expected {list(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    if not (missing or unexpected or wrong):
        return
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
    lines = [f"{kind} ({len(found)}): {_some(found)}" for kind, found in kinds if found]
    raise UsageError(f"the weights do not fit this model in the layout of {layout}; " + "; ".join([*lines, advice]))


def copy_weights(own: StateDict, native: StateDict) -> LoadReport:
    """Copy `native` into the tensors of `own`, both by our names, each in its own dtype and on its own device."""
    with torch.no_grad():
        for key, value in native.items():
            own[key].copy_(value)
    return LoadReport(loaded=list(native), not_set=[key for key in own if key not in native])


def _size_text(patch_size: int, width: int, depth: int) -> str:
    known = {(size.patch_size, size.width, size.depth): name for name, size in SIZES.items()}
    name = known.get((patch_size, width, depth), "a ViT")
    return f"{name} (patch {patch_size} px, width {width}, {depth} blocks)"


def _some(items: list[str], limit: int = 12) -> str:
    return ", ".join(items[:limit]) + (f", and {len(items) - limit} more" if len(items) > limit else "")
