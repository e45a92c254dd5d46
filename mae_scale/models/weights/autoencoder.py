"""Weights of an autoencoder or its encoder, in the layouts of the authors' release, timm and Hugging Face's ViTMAE.

Positions are fixed: a model computes them and does not store them, so they are written into files, and compared when
one is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.vit import Encoder, sincos_positions
from mae_scale.models.weights.checked_copy import LoadReport, check_same, check_size, copy_weights
from mae_scale.models.weights.files import StateDict
from mae_scale.models.weights.layouts import (
    AUTOENCODER,
    DECODER,
    UNNAMED,
    from_release,
    hf_to_release,
    release_to_hf,
    to_release,
)

_POSITIONS = ("pos_embed", "decoder_pos_embed")
_POSITION_TOLERANCE = 1e-4  # copies computed in single precision are off by a few 1e-6


def to_official(model: MaskedAutoencoder | Encoder, *, decoder: bool = True) -> StateDict:
    """Return the weights by the authors' release's names, with positions (fp32); `decoder=False`: the encoder alone.

    Tensors are copies, on the model's device and in its dtype. Raises UsageError for a model with mask tokens
    in the encoder and `decoder=True`: its decoder has no mask token, which that layout requires.
    """
    decoder = decoder and isinstance(model, MaskedAutoencoder)
    if decoder and _encoder_of(model).mask_token is not None:
        raise UsageError(
            "a model with mask tokens in the encoder has no decoder mask token, so no other program could "
            "use its decoder: export the encoder alone, with decoder=False"
        )
    return {key: value.detach().clone() for key, value in _to_release(model, decoder).items()}


def to_timm(model: MaskedAutoencoder | Encoder) -> StateDict:
    """Return the encoder for timm's `VisionTransformer(num_classes=0, global_pool="token")` of the same size."""
    return to_official(model, decoder=False)


def to_hf(model: MaskedAutoencoder | Encoder, *, decoder: bool = True) -> StateDict:
    """Return the weights by the names of Hugging Face's ViTMAE files, for `from_pretrained`; else as `to_official`."""
    return release_to_hf(to_official(model, decoder=decoder))


def load_official(model: MaskedAutoencoder | Encoder, state_dict: StateDict) -> LoadReport:
    """Copy a release file's tensors into the model; one without decoder leaves the model's as it is.

    A bare Encoder takes a file with or without decoder. Raises UsageError saying that it is a file of another
    size, or listing keys that are missing or unexpected, shapes that do not fit, and positions that are not the
    fixed sine-cosine ones.
    """
    return _load(model, state_dict, "the authors' release")


def load_timm(model: MaskedAutoencoder | Encoder, state_dict: StateDict) -> LoadReport:
    """Copy a timm VisionTransformer's weights (an encoder, no decoder) into the model, as `load_official` does."""
    return _load(model, state_dict, "timm")


def load_hf(model: MaskedAutoencoder | Encoder, state_dict: StateDict) -> LoadReport:
    """Copy Hugging Face's ViTMAE weights (the hub's, `save_pretrained`'s, a module's) as `load_official` does."""
    return _load(model, hf_to_release(state_dict), "Hugging Face ViTMAE")


def _load(model: MaskedAutoencoder | Encoder, given: StateDict, layout: str) -> LoadReport:
    """Check `given` (release names) against the model, then copy it."""
    whole, encoder = isinstance(model, MaskedAutoencoder), _encoder_of(model)
    has_decoder = any(key.startswith(DECODER) for key in given)
    take_decoder = whole and has_decoder
    if take_decoder and encoder.mask_token is not None:
        raise UsageError(
            "the file has a decoder with a mask token, this model has its mask tokens in the encoder: "
            "load a file without decoder, or build the model with encoder_mask_tokens=False"
        )
    check_size(given, encoder.size)
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
    report = copy_weights(_by_our_names(model), native)
    report.unused = unused + positions
    return report


def _to_release(model: MaskedAutoencoder | Encoder, decoder: bool) -> StateDict:
    """Return ours -> release with the fixed positions, without tensors that have no name there."""
    encoder = _encoder_of(model)
    state: StateDict = {"pos_embed": _positions(encoder.size.width, encoder)}
    if decoder and isinstance(model, MaskedAutoencoder):
        state["decoder_pos_embed"] = _positions(model.decoder.width, encoder)
    left_out = UNNAMED if decoder else (*UNNAMED, *DECODER)
    released = to_release(_by_our_names(model), AUTOENCODER)
    return state | {key: value for key, value in released.items() if not key.startswith(left_out)}


def _encoder_of(model: MaskedAutoencoder | Encoder) -> Encoder:
    return model.encoder if isinstance(model, MaskedAutoencoder) else model


def _by_our_names(model: MaskedAutoencoder | Encoder) -> StateDict:
    """Return a model's own tensors by an autoencoder's names."""
    prefix = "" if isinstance(model, MaskedAutoencoder) else "encoder."
    return {prefix + key: value for key, value in model.state_dict().items()}


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference of two tensors."""
    return (a.detach().to("cpu", torch.float32) - b.detach().to("cpu", torch.float32)).abs().max().item()


def _positions(width: int, encoder: Encoder) -> Tensor:
    """Return positions fp32 [1, 1 + L, width], not rounded to the model's dtype."""
    return torch.tensor(sincos_positions(width, encoder.grid), device=encoder.pos_embed.device)[None]
