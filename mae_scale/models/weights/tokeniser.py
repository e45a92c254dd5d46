"""Weights of a tokeniser, in the layouts of transformers' FlavaImageCodebook and of the published DALL-E encoder."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch

from data_pipeline.errors import UsageError
from mae_scale.models.tokeniser import Tokeniser, TokeniserSize
from mae_scale.models.weights.checked_copy import check_same, copy_weights
from mae_scale.models.weights.files import StateDict, read_weights
from mae_scale.models.weights.whole_module import read_module

_PREFIXES = ("image_codebook.", "flava.image_codebook.", "model.")
"""Of files that hold more than the tokeniser."""


def read_tokeniser(path: Path) -> Tokeniser:
    """Return the tokeniser of a .safetensors or torch file, or of a module that was pickled whole (.pkl), frozen.

    Its sizes are those of the file. Raises UsageError when it cannot be read, or is no tokeniser of this layout.
    """
    given = read_module(path) if path.suffix == ".pkl" else read_weights(path)
    weights = {_name(key): value for key, value in _own(given).items()}
    with torch.device("meta"):
        model = Tokeniser(_size(weights, path))
    check_same(
        weights,
        dict(model.state_dict()),
        layout="transformers' FlavaImageCodebook or DALL-E's encoder",
        advice=f"found in {path}",
    )
    model = model.to_empty(device="cpu")
    copy_weights(dict(model.state_dict()), weights)
    return model.requires_grad_(False).eval()


def tokeniser_digest(model: Tokeniser) -> str:
    """Return 64 hex digits that change with any weight, and not with the layout or place of the file they came from."""
    state = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        state.update(f"{name} {tuple(value.shape)}".encode())
        state.update(value.detach().cpu().float().contiguous().numpy().data)
    return state.hexdigest()


def _own(given: StateDict) -> StateDict:
    """Return what belongs to the tokeniser, by its own names."""
    for prefix in _PREFIXES:
        found = {key.removeprefix(prefix): value for key, value in given.items() if key.startswith(f"{prefix}blocks.")}
        if found:
            return found
    return given


def _name(key: str) -> str:
    """Return transformers' name of a parameter, of it or of DALL-E's (blocks.group_1.block_1.res_path.conv_1.w)."""
    key = re.sub(r"(group_\d\.)(?=block_)", r"\1group.", key)
    key = re.sub(r"res_path\.(?=conv_)", "res_path.path.", key)
    return re.sub(r"\.b$", ".bias", re.sub(r"\.w$", ".weight", key))


def _size(weights: StateDict, path: Path) -> TokeniserSize:
    first, last = weights.get("blocks.input.weight"), weights.get("blocks.output.conv.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        raise UsageError(
            f"{path} has no tokeniser: expected blocks.input, blocks.group_1 to group_4 and blocks.output, as in "
            "transformers' FlavaImageCodebook or DALL-E's encoder.pkl"
        )
    blocks = {match[1] for key in weights if (match := re.match(r"blocks\.group_1\.group\.block_(\d+)\.", key))}
    return TokeniserSize(width=first.shape[0], words=last.shape[0], blocks_per_group=len(blocks))
