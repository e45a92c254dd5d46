"""The names and shapes of weights in the published layouts: the authors' release, timm, and Hugging Face's ViT(MAE).

Our own names map to the release's one to one (`AUTOENCODER`), so every layout goes through it:

    ours  <->  release  <->  timm (the release without its decoder)
                        <->  Hugging Face (other names; query, key and value apart)

Besides names the patch projection differs, linear [D, p*p*3] in the order (row, column, channel) here, a convolution
[D, 3, p, p] there, and positions have a leading dimension there. L patches, D the width, p the patch's side in pixels.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from mae_scale.models.weights.files import StateDict

Names = tuple[tuple[str, str], ...]
"""Rows of two beginnings of a key: in one layout, in another."""

ENCODER: Names = (  # ours, release
    ("encoder.cls_token", "cls_token"),
    ("encoder.pos_embed", "pos_embed"),
    ("encoder.patch_embed.", "patch_embed.proj."),
    ("encoder.blocks.", "blocks."),
    ("encoder.norm.", "norm."),
)
AUTOENCODER: Names = (
    *ENCODER,
    ("decoder.embed.", "decoder_embed."),
    ("decoder.mask_token", "mask_token"),
    ("decoder.blocks.", "decoder_blocks."),
    ("decoder.norm.", "decoder_norm."),
    ("head.", "decoder_pred."),
)
_HF: Names = (  # release, Hugging Face; the names of the files on its hub, which every version of transformers reads
    ("cls_token", "vit.embeddings.cls_token"),
    ("pos_embed", "vit.embeddings.position_embeddings"),
    ("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("blocks.", "vit.encoder.layer."),
    ("norm.", "vit.layernorm."),
    ("decoder_embed.", "decoder.decoder_embed."),
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.decoder_pos_embed"),
    ("decoder_blocks.", "decoder.decoder_layers."),
    ("decoder_norm.", "decoder.decoder_norm."),
    ("decoder_pred.", "decoder.decoder_pred."),
    ("head.", "classifier."),
)
_HF_BLOCK: Names = (  # inside a block: release, Hugging Face
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
_HF_QKV = (".attention.attention.query.", ".attention.attention.key.", ".attention.attention.value.")
_HF_SPELLINGS = (  # as transformers 5 names its modules, or writes its files -> as on the hub
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"\.attention\.q_proj\.", _HF_QKV[0]),
    (r"\.attention\.k_proj\.", _HF_QKV[1]),
    (r"\.attention\.v_proj\.", _HF_QKV[2]),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
DECODER = ("decoder_", "mask_token")  # how the release's decoder keys begin
UNNAMED = ("target.", "encoder.mask_token")  # ours that no other layout has a name for


_AFTER_ENCODER = {"rpn.": "a detector", "auxiliary.": "a segmenter"}
"""How names begin that no encoder has, and what has them."""


def dense_kind(state: StateDict) -> str | None:
    """Return what weights are of: "a detector" or "a segmenter", by our own names; None for another model."""
    kinds = (kind for name in state for beginning, kind in _AFTER_ENCODER.items() if name.startswith(beginning))
    return next(kinds, None)


def to_release(state: StateDict, names: Names) -> StateDict:
    """Return ours -> release, views where possible; keys without a name there keep theirs."""
    released: StateDict = {}
    for key, value in state.items():
        name = _rename(key, names, key)
        if name == "patch_embed.proj.weight" and value.ndim == 2:
            p = round((value.shape[1] / 3) ** 0.5)
            if 3 * p * p == value.shape[1]:
                value = value.reshape(-1, p, p, 3).permute(0, 3, 1, 2).contiguous()  # [D, 3, p, p]
        elif name == "pos_embed":
            value = value[None]  # [1, 1 + L, D]
        released[name] = value
    return released


def from_release(state: StateDict, names: Names) -> StateDict:
    """Return release -> ours; every key has a name of ours."""
    back = tuple((to, ours) for ours, to in names)
    native: StateDict = {}
    for key, value in state.items():
        if key == "patch_embed.proj.weight":
            value = value.permute(0, 2, 3, 1).reshape(value.shape[0], -1)  # [D, p*p*3]
        elif key == "pos_embed":
            value = value[0]  # [1 + L, D]
        native[_rename(key, back, key)] = value
    return native


def release_to_hf(state: StateDict) -> StateDict:
    """Return release -> Hugging Face, as on its hub; every key has a name there."""
    converted: StateDict = {}
    for key, value in state.items():
        name = _rename(key, _HF, key)
        if ".attn.qkv." in key:
            for part, chunk in zip(_HF_QKV, value.chunk(3), strict=True):
                converted[name.replace(".attn.qkv.", part)] = chunk.clone()
            continue
        for ours, theirs in _HF_BLOCK:
            name = name.replace(ours, theirs)
        converted[name] = value
    return converted


def hf_to_release(state: StateDict) -> StateDict:
    """Return Hugging Face -> release, of a bare model too; keys without a name there keep theirs, to be reported."""
    back = tuple((theirs, ours) for ours, theirs in _HF)
    bare = not any(key.startswith("vit.") for key in state)
    converted: StateDict = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for given, value in state.items():
        name = "vit." + given if bare else given
        for pattern, to in _HF_SPELLINGS:
            name = re.sub(pattern, to, name)
        part = next((part for part in _HF_QKV if part in name), None)
        if part is not None:
            name = name.replace(part, ".attn.qkv.")
        for ours, theirs in _HF_BLOCK:
            name = name.replace(theirs, ours)
        name = _rename(name, back, given)
        if part is None:
            converted[name] = value
        else:
            parts.setdefault(name, {})[part] = value
    for name, found in parts.items():
        if len(found) == len(_HF_QKV) and len({value.shape for value in found.values()}) == 1:
            converted[name] = torch.cat([found[part] for part in _HF_QKV])
    return converted


def _rename(key: str, names: Names, otherwise: str) -> str:
    """Return the key with its beginning replaced as the table says; `otherwise` when no row fits."""
    return next((to + key[len(prefix) :] for prefix, to in names if key.startswith(prefix)), otherwise)
