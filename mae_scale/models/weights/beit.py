"""Weights of BEiT, in the layouts of the authors' release, timm and Hugging Face; in pre-training and as a classifier.

Ours map to the authors' names one to one, and every layout goes through these:

    ours  <->  release  <->  timm (the release without its head of words and mask token)
                        <->  Hugging Face (other names; query, key and value apart)

Pre-trained files have one table of relative position biases, `rel_pos_bias.relative_position_bias_table`, fine-tuned
ones a table per block, `blocks.0.attn.relative_position_bias_table`, as our classifiers have; those are read and
written by classifier.py, which takes the names and tables from here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor

from data_pipeline.errors import UsageError
from data_pipeline.image_size import size_text
from mae_scale.models.beit import CLS_ROWS, TABLE, Beit, distances, table_rows
from mae_scale.models.weights.checked_copy import LoadReport, check_same, check_size, copy_weights
from mae_scale.models.weights.files import StateDict
from mae_scale.models.weights.layouts import ENCODER, Names, from_release, to_release

SHARED = f"rel_pos_bias.{TABLE}"
PRETRAINING: Names = (  # ours, release
    *ENCODER,
    ("encoder.mask_token", "mask_token"),
    ("encoder.rel_pos_bias.", "rel_pos_bias."),
    ("head.", "lm_head."),
)
_CLASSIFIER: Names = (*ENCODER, ("fc_norm.", "fc_norm."), ("batch_norm.", "batch_norm."), ("head.", "head."))
_HEADS = ("head.", "lm_head.", "fc_norm.")
_HF: Names = (  # release, Hugging Face: names of the files on its hub, which every version of transformers reads
    ("cls_token", "beit.embeddings.cls_token"),
    ("mask_token", "beit.embeddings.mask_token"),
    ("patch_embed.proj.", "beit.embeddings.patch_embeddings.projection."),
    ("rel_pos_bias.", "beit.encoder.relative_position_bias."),
    ("blocks.", "beit.encoder.layer."),
    ("fc_norm.", "beit.pooler.layernorm."),
    ("lm_head.", "lm_head."),
    ("head.", "classifier."),
)
_HF_BLOCK: Names = (  # inside a block: release, Hugging Face
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".gamma_1", ".lambda_1"),
    (".gamma_2", ".lambda_2"),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (f".attn.{TABLE}", f".attention.attention.relative_position_bias.{TABLE}"),
    (".attn.q_bias", ".attention.attention.query.bias"),
    (".attn.v_bias", ".attention.attention.value.bias"),
)
_QKV = tuple(f".attention.attention.{part}.weight" for part in ("query", "key", "value"))
_HF_SPELLINGS = (  # as transformers 5 names its modules -> as on the hub
    (r"^beit\.layers\.", "beit.encoder.layer."),
    (r"^beit\.shared_position_bias\.", "beit.encoder.relative_position_bias."),
    (r"(\.layer\.\d+)\.relative_position_bias\.", r"\1.attention.attention.relative_position_bias."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^beit\.layernorm\.", "layernorm."),
)


def is_beit(state: StateDict) -> bool:
    """Return whether weights are a BEiT's, in any of the layouts: they have a scale of each branch."""
    return any(key.endswith((".gamma_1", ".lambda_1")) for key in state)


def beit_release_names(state: StateDict) -> StateDict:
    """Return a BEiT's tensors by the release's names; keys without a name there keep theirs. Buffers are left out."""
    state = {key: value for key, value in state.items() if not key.endswith("relative_position_index")}
    if any(key.startswith("encoder.blocks.") for key in state):
        return to_release(state, PRETRAINING if "encoder.mask_token" in state else _CLASSIFIER)
    if any(key.endswith(".lambda_1") for key in state):
        return _hf_to_release(state)
    return dict(state)


def beit_to_official(model: Beit) -> StateDict:
    """Return the weights by the names of the authors' pre-trained files, copies on the model's device, in its dtype."""
    own = {key: value.detach().clone() for key, value in model.state_dict().items() if not key.startswith("target.")}
    return to_release(own, PRETRAINING)


def beit_to_timm(model: Beit) -> StateDict:
    """Return the encoder for timm's `Beit(num_classes=0, global_pool="token")` of the same size, a table per block."""
    state = beit_to_official(model)
    table = state.pop(SHARED)
    tables = {f"blocks.{n}.attn.{TABLE}": table.clone() for n in range(model.encoder.size.depth)}
    return {key: value for key, value in state.items() if not key.startswith((*_HEADS, "mask_token"))} | tables


def beit_to_hf(model: Beit) -> StateDict:
    """Return the weights by the names of Hugging Face's BeitForMaskedImageModeling files, for `from_pretrained`."""
    return release_to_beit_hf(beit_to_official(model))


def load_beit(model: Beit, state: StateDict) -> LoadReport:
    """Copy a file's tensors into the model in pre-training; the keys tell the layout.

    Raises UsageError, with nothing copied, when the file is no BEiT in pre-training, or of another size.
    """
    given = beit_release_names(state)
    check_size(given, model.encoder.size)
    expected = to_release(dict(model.state_dict()), PRETRAINING)
    advice = "give a file of a BEiT in pre-training, with its head (BeitForMaskedImageModeling), of this model's sizes"
    check_same(given, expected, layout="BEiT", advice=advice)
    return copy_weights(dict(model.state_dict()), from_release(given, PRETRAINING))


def own_tables(given: StateDict, *, grids: Sequence[tuple[int, int]], given_grid: tuple[int, int] | None) -> StateDict:
    """Return a file's tensors (release names) with a table of biases for each block, of the grid that is its own.

    given_grid: of the file's tables, where it is known; else a square's, or the model's. A shared table is copied into
    each block. Tables of another grid are resampled as the authors do, between unevenly spaced distances, but linearly
    (timm's `resize_rel_pos_bias_table`) where theirs are cubic.
    Raises UsageError for tables of a single row or column of patches where a block's grid is another.
    """
    given = dict(given)
    shared = given.pop(SHARED, None)
    for number, grid in enumerate(grids):
        name = f"blocks.{number}.attn.{TABLE}"
        if (table := given.get(name, shared)) is not None:
            given[name] = _on_grid(table, grid, given_grid)
    return given


def _on_grid(table: Tensor, grid: tuple[int, int], given_grid: tuple[int, int] | None) -> Tensor:
    """Return a table of biases [rows, H] resampled to a grid, float32; as it is where it fits, or is no table."""
    of = given_grid or _square_of(table)
    if of is None and table.shape[0] == table_rows(grid):
        of = grid
    if of == grid or of is None or table.shape[0] != table_rows(of):
        return table
    if 1 in of:
        raise UsageError(
            f"relative positions of {size_text(of)} patches cannot be resampled to {size_text(grid)}: they have no "
            "distances along one side; give weights of another grid"
        )
    patches = table[:-CLS_ROWS].float().T.unflatten(1, distances(of))  # [H, 2 h - 1, 2 w - 1]
    resampled = resize_rel_pos_bias_table(patches, grid, (table.shape[1], *distances(grid)))
    return torch.cat([resampled.flatten(1).T, table[-CLS_ROWS:].float()])


def _square_of(table: Tensor) -> tuple[int, int] | None:
    """Return the grid of a square's table [rows, H]; None for any other."""
    grid = (math.isqrt(max(0, table.shape[0] - CLS_ROWS)) + 1) // 2
    return (grid, grid) if grid and table.shape[0] == table_rows(grid) else None


def grid_in(given: StateDict) -> tuple[int, int] | None:
    """Return the grid of a file's tables (release names), of a square; None when it has none."""
    table = next((value for key, value in given.items() if key.endswith(TABLE)), None)
    return None if table is None else _square_of(table)


def release_to_beit_hf(state: StateDict) -> StateDict:
    """Return release -> Hugging Face, as on its hub; beside a head of words the final norm has no prefix there."""
    norm = "layernorm." if "lm_head.weight" in state else "beit.layernorm."
    names = (*_HF, ("norm.", norm))
    converted: StateDict = {}
    for key, value in state.items():
        name = _rename(key, names)
        if key.endswith(".attn.qkv.weight"):
            for part, chunk in zip(_QKV, value.chunk(3), strict=True):
                converted[name.replace(".attn.qkv.weight", part)] = chunk.clone()
            continue
        converted[_in_block(name, _HF_BLOCK)] = value
    return converted


def _hf_to_release(state: StateDict) -> StateDict:
    """Return Hugging Face -> release, of a bare model too; keys without a name there keep theirs, to be reported."""
    names = tuple((theirs, ours) for ours, theirs in (*_HF, ("norm.", "layernorm.")))
    in_block = tuple((theirs, ours) for ours, theirs in _HF_BLOCK)
    bare = not any(key.startswith("beit.") for key in state)
    converted: StateDict = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for given, value in state.items():
        name = "beit." + given if bare else given
        for pattern, to in _HF_SPELLINGS:
            name = re.sub(pattern, to, name)
        part = next((part for part in _QKV if name.endswith(part)), None)
        if part is not None:
            parts.setdefault(_rename(name.replace(part, ".attn.qkv.weight"), names), {})[part] = value
        else:
            converted[_rename(_in_block(name, in_block), names)] = value
    for name, found in parts.items():
        if len(found) == len(_QKV) and len({value.shape for value in found.values()}) == 1:
            converted[name] = torch.cat([found[part] for part in _QKV])
    return converted


def _in_block(name: str, names: Names) -> str:
    for theirs, to in names:
        name = name.replace(theirs, to)
    return name


def _rename(key: str, names: Names) -> str:
    return next((to + key[len(prefix) :] for prefix, to in names if key.startswith(prefix)), key)
