"""Weights files in the layouts of the world: the authors' release, timm, and Hugging Face ViTMAE.

Our own names map to the release's one to one (`AUTOENCODER`), so every layout goes through it:

    ours  <->  release  <->  timm (the release without its decoder)
                        <->  Hugging Face (other names; query, key and value apart)

What differs besides names: the patch projection, linear [D, p*p*3] in the order (row, column, channel) here,
a convolution [D, 3, p, p] there; and positions, which are fixed: here they are computed and not stored, so
they are written into files, and on reading compared.
Reading is strict: whatever is missing, left over or of another shape is an error that lists it.
Weights of a classifier are in `classifier_weights`, with the same names.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import UsageError
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.vit import SIZES, Encoder, ViTSize, sincos_positions

Names = tuple[tuple[str, str], ...]  # rows of two beginnings of a key: in one layout, in another

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
_POSITIONS = ("pos_embed", "decoder_pos_embed")
DECODER = ("decoder_", "mask_token")  # how the release's decoder keys begin
UNNAMED = ("target.", "encoder.mask_token")  # ours that no other layout has a name for
_POSITION_TOLERANCE = 1e-4  # copies computed in single precision are off by a few 1e-6

StateDict = dict[str, Tensor]


@dataclass
class LoadReport:
    """What a load did: our names set, our names the file does not have, the file's names not copied."""

    loaded: list[str]
    not_set: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def to_official(model: MaskedAutoencoder | Encoder, *, decoder: bool = True) -> StateDict:
    """Return the authors' release's names and shapes, positions (fp32) included; `decoder=False`: the encoder alone.

    Tensors are copies, on the model's device and in its dtype. Raises UsageError for a model with mask tokens
    in the encoder and `decoder=True`: its decoder has no mask token, which that layout requires.
    """
    decoder = decoder and isinstance(model, MaskedAutoencoder)
    if decoder and model.encoder_mask_tokens:
        raise UsageError(
            "a model with mask tokens in the encoder has no decoder mask token, so no other program could "
            "use its decoder: export the encoder alone, with decoder=False"
        )
    return {key: value.detach().clone() for key, value in _to_release(model, decoder).items()}


def to_timm(model: MaskedAutoencoder | Encoder) -> StateDict:
    """Return the encoder for timm's `VisionTransformer(num_classes=0, global_pool="token")` of the same size."""
    return to_official(model, decoder=False)


def to_hf(model: MaskedAutoencoder | Encoder, *, decoder: bool = True) -> StateDict:
    """Names and shapes of Hugging Face's ViTMAE files, for `from_pretrained`; otherwise as `to_official`."""
    return release_to_hf(to_official(model, decoder=decoder))


def load_official(model: MaskedAutoencoder | Encoder, state_dict: StateDict) -> LoadReport:
    """Copies a release file's tensors into the model; one without decoder leaves the model's as it is.

    A bare Encoder takes a file with or without decoder. Raises UsageError saying that it is a file of another
    size, or listing keys that are missing or unexpected, shapes that do not fit, and positions that are not the
    fixed sine-cosine ones.
    """
    return _load(model, state_dict, "the authors' release")


def load_timm(model: MaskedAutoencoder | Encoder, state_dict: StateDict) -> LoadReport:
    """As `load_official`, for a timm VisionTransformer's weights (an encoder, no decoder)."""
    return _load(model, state_dict, "timm")


def load_hf(model: MaskedAutoencoder | Encoder, state_dict: StateDict) -> LoadReport:
    """As `load_official`, for Hugging Face ViTMAE weights: the hub's, `save_pretrained`'s or a module's."""
    return _load(model, hf_to_release(state_dict), "Hugging Face ViTMAE")


def read_weights(path: str | Path) -> StateDict:
    """Return the tensors of a .safetensors or torch (.pth) file by name; unwraps the release's {"model": ...}.

    Torch files are read with `weights_only=True`: code hidden in a file is refused, never run.
    Raises UsageError when the file is missing, damaged, refused, or holds anything but named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no weights file at {path}: expected a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error
    try:
        # The release keeps its arguments, a Namespace, beside "model". Warnings are on what is refused anyway.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"WeightsUnpickler error:\s*([^\n]+)", str(error))  # then comes advice to read it
        raise UsageError(
            f"{path} was refused: it is damaged, or holds more than tensors, which could run code when read"
            f"{f' ({found[1]})' if found else ''}. Expected weights only: fetch it again, or have its author save "
            "them as safetensors"
        ) from error
    except Exception as error:  # of a file of another kind torch takes any byte for an instruction
        raise UsageError(f"{path} is not a whole torch file ({error}): fetch it again") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()) or not content:
        found = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content).__name__
        raise UsageError(f'{path} holds {found}: expected tensors by name, alone or under "model"')
    return content


def check_size(given: StateDict, size: ViTSize) -> None:
    """Raises UsageError when the file (release names) is of another patch, width or depth; heads leave no trace."""
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
    """Raises UsageError, ending in the advice, that lists keys (release names) and shapes that are not as expected."""
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
    """Copies `native` into the tensors of `own`, both by our names, each in its own dtype and on its own device."""
    with torch.no_grad():
        for key, value in native.items():
            own[key].copy_(value)
    return LoadReport(loaded=list(native), not_set=[key for key in own if key not in native])


def to_release(state: StateDict, names: Names) -> StateDict:
    """Ours -> release, views where possible; keys that have no place there keep their name."""
    released: StateDict = {}
    for key, value in state.items():
        name = _rename(key, names) or key
        if name == "patch_embed.proj.weight" and value.ndim == 2:
            p = round((value.shape[1] / 3) ** 0.5)
            if 3 * p * p == value.shape[1]:
                value = value.reshape(-1, p, p, 3).permute(0, 3, 1, 2).contiguous()  # [D, 3, p, p]
        elif name == "pos_embed":
            value = value[None]  # [1, 1 + L, D]
        released[name] = value
    return released


def from_release(state: StateDict, names: Names) -> StateDict:
    """Release -> ours; every key has a name of ours."""
    back = tuple((to, ours) for ours, to in names)
    native: StateDict = {}
    for key, value in state.items():
        if key == "patch_embed.proj.weight":
            value = value.permute(0, 2, 3, 1).reshape(value.shape[0], -1)  # [D, p*p*3]
        elif key == "pos_embed":
            value = value[0]  # [1 + L, D]
        native[_rename(key, back)] = value
    return native


def release_to_hf(state: StateDict) -> StateDict:
    """Release -> Hugging Face, as on its hub; every key has a name there."""
    converted: StateDict = {}
    for key, value in state.items():
        name = _rename(key, _HF)
        if ".attn.qkv." in key:
            for part, chunk in zip(_HF_QKV, value.chunk(3), strict=True):
                converted[name.replace(".attn.qkv.", part)] = chunk.clone()
            continue
        for ours, theirs in _HF_BLOCK:
            name = name.replace(ours, theirs)
        converted[name] = value
    return converted


def hf_to_release(state: StateDict) -> StateDict:
    """Hugging Face -> release, a bare model too; keys that have no place there keep their name, to be reported."""
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
        name = _rename(name, back) or given
        if part is None:
            converted[name] = value
        else:
            parts.setdefault(name, {})[part] = value
    for name, found in parts.items():
        if len(found) == len(_HF_QKV) and len({value.shape for value in found.values()}) == 1:
            converted[name] = torch.cat([found[part] for part in _HF_QKV])
    return converted


def _load(model: MaskedAutoencoder | Encoder, given: StateDict, layout: str) -> LoadReport:
    """Checks `given` (release names) against the model, then copies it."""
    whole = isinstance(model, MaskedAutoencoder)
    has_decoder = any(key.startswith(DECODER) for key in given)
    take_decoder = whole and has_decoder
    if take_decoder and model.encoder_mask_tokens:
        raise UsageError(
            "the file has a decoder with a mask token, this model has its mask tokens in the encoder: "
            "load a file without decoder, or build the model with encoder_mask_tokens=False"
        )
    check_size(given, model.encoder.size if whole else model.size)
    unused = [key for key in given if key.startswith(DECODER)] if has_decoder and not whole else []
    given = {key: value for key, value in given.items() if key not in set(unused)}
    expected = _to_release(model, take_decoder)
    if any(key.startswith(("head.", "fc_norm.")) for key in given):
        advice = "it is a classifier's file; a masked autoencoder starts from pre-trained weights"
    else:
        advice = "build the model with the file's sizes, or give a file of this model's"
    check_same(given, expected, layout=layout, advice=advice)
    positions = [key for key in _POSITIONS if key in given]
    for key in positions:
        if not expected[key].is_meta and _difference(given[key], expected[key]) > _POSITION_TOLERANCE:
            raise UsageError(
                f"{key} in the layout of {layout} is not the fixed 2-D sine-cosine position of this model: "
                "learned, resized or unset positions do not fit a masked autoencoder"
            )
    native = from_release({key: value for key, value in given.items() if key not in positions}, AUTOENCODER)
    own = {key if whole else "encoder." + key: value for key, value in model.state_dict(keep_vars=True).items()}
    report = copy_weights(own, native)
    report.unused = unused + positions
    return report


def _to_release(model: MaskedAutoencoder | Encoder, decoder: bool) -> StateDict:
    """Ours -> release with the fixed positions; what has no place there is left out."""
    whole = isinstance(model, MaskedAutoencoder)
    encoder = model.encoder if whole else model
    state: StateDict = {"pos_embed": _positions(encoder.size.width, encoder)}
    if decoder:
        state["decoder_pos_embed"] = _positions(model.decoder.norm.normalized_shape[0], encoder)
    own = {key if whole else "encoder." + key: value for key, value in model.state_dict().items()}
    left_out = UNNAMED if decoder else (*UNNAMED, *DECODER)
    released = to_release(own, AUTOENCODER)
    return state | {key: value for key, value in released.items() if not key.startswith(left_out)}


def _size_text(patch_size: int, width: int, depth: int) -> str:
    known = {(size.patch_size, size.width, size.depth): name for name, size in SIZES.items()}
    name = known.get((patch_size, width, depth), "a ViT")
    return f"{name} (patch {patch_size} px, width {width}, {depth} blocks)"


def _some(items: list[str], limit: int = 12) -> str:
    return ", ".join(items[:limit]) + (f", and {len(items) - limit} more" if len(items) > limit else "")


def _difference(a: Tensor, b: Tensor) -> float:
    return (a.detach().to("cpu", torch.float32) - b.detach().to("cpu", torch.float32)).abs().max().item()


def _rename(key: str, names: Names) -> str | None:
    """Return the key with its beginning replaced as the table says; None when no row fits."""
    return next((to + key[len(prefix) :] for prefix, to in names if key.startswith(prefix)), None)


def _positions(width: int, encoder: Encoder) -> Tensor:
    """fp32 [1, 1 + L, width], not rounded by the model's dtype."""
    return torch.tensor(sincos_positions(width, encoder.grid), device=encoder.pos_embed.device)[None]
