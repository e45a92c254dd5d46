"""Weights of a classifier: read from a file in any known layout, written in those that other programs read.

Every file is brought to the release's names first (layouts.py). Then it is one of

    pre-training   encoder, norm.*, or also a decoder      fc_norm.*, head.* stay fresh
    mean-pooled    encoder, fc_norm.*, head.*              the authors' fine-tuned files; timm, global_pool="avg"
    cls-pooled     encoder, norm.*, head.*                 timm, global_pool="token"; Hugging Face

Positions are learned here and in all these files, [1, 1 + L, D] there; those of another grid are resampled.
L patches, D the width, p the patch's side in pixels.
"""

from __future__ import annotations

import math

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from data_pipeline.errors import UsageError
from mae_scale.models.beit import BeitEncoder
from mae_scale.models.classifier import Classifier, GlobalBatchNorm
from mae_scale.models.weights.beit import beit_release_names, is_beit, own_tables, release_to_beit_hf
from mae_scale.models.weights.checked_copy import LoadReport, check_same, check_size, copy_weights
from mae_scale.models.weights.files import StateDict
from mae_scale.models.weights.layouts import (
    AUTOENCODER,
    DECODER,
    ENCODER,
    UNNAMED,
    Names,
    dense_kind,
    from_release,
    hf_to_release,
    release_to_hf,
    to_release,
)
from mae_scale.models.weights.moco import encoder_of_moco

_CLASSIFIER: Names = (  # ours, release
    *ENCODER,
    ("fc_norm.", "fc_norm."),
    ("batch_norm.", "batch_norm."),
    ("head.", "head."),
)
_MAY_STAY_FRESH = ("fc_norm.", "batch_norm.", "head.")
_OUR_AUTOENCODER = "our own autoencoder"


def load_classifier(model: Classifier, state: StateDict, grid: tuple[int, int] | None = None) -> LoadReport:
    """Copy a file's tensors (`read_weights`) into the classifier; the keys tell the layout.

    Layouts: the authors' releases (pre-trained, with or without decoder, and fine-tuned), timm's, Hugging Face's
    (ViTMAE and ViTForImageClassification), MoCo v3's checkpoints, and our own of a MaskedAutoencoder or a Classifier;
    for a classifier on BEiT's encoder BEiT's (weights/beit.py). Our autoencoder's has no positions unless
    "encoder.pos_embed" [1 + L, D] is put beside its tensors; without it those of the model, which begin as the fixed
    ones of its own grid, stay as they are and are reported as not set.
    In the report `unused` (release names) is a decoder, a head of words, a target's buffers, an encoder's mask token,
    and the final norm of pre-trained weights when the classifier pools by mean (the release drops it too).
    Positions of another grid are resampled in float32, bicubic and without antialiasing, as the authors do at 448 px
    (their `interpolate_pos_embed`). `grid` is the file's rows and columns of patches, where they are known
    (`mae_scale.checkpoints.export.grid_of_weights`); else a square's, or where no square has as many, the model's.
    Raises UsageError, with nothing copied: a file of another size, of a classifier of another kind (pooling,
    BatchNorm, number of classes); keys that are missing or unexpected, shapes that do not fit.
    """
    given, layout = release_names(state)
    check_encoder(given, takes_beit=isinstance(model.encoder, BeitEncoder))
    check_size(given, model.encoder.size)
    unused_kinds: tuple[str, ...] = (*UNNAMED, *DECODER, "lm_head.")
    if _has(given, "fc_norm.") or _has(given, "head."):
        _check_kind(model, given)
    elif model.pool == "mean":
        unused_kinds += ("norm.",)
    unused = [key for key in given if key.startswith(unused_kinds)]
    given = {key: value for key, value in given.items() if not key.startswith(unused_kinds)}
    if "pos_embed" in given:
        given["pos_embed"] = on_grid(given["pos_embed"], model.encoder.grid, grid)
    if isinstance(model.encoder, BeitEncoder):
        given = own_tables(given, grids=[model.encoder.grid] * model.encoder.size.depth, given_grid=grid)

    fresh = tuple(kind for kind in _MAY_STAY_FRESH if not _has(given, kind))
    if layout == _OUR_AUTOENCODER and "pos_embed" not in given:
        fresh += ("pos_embed",)
    own = model.state_dict(keep_vars=True)
    expected = {key: value for key, value in to_release(own, _CLASSIFIER).items() if not key.startswith(fresh)}
    check_same(given, expected, layout=layout, advice="give a whole file of a plain ViT, with nothing else in it")
    report = copy_weights(own, from_release(given, _CLASSIFIER))
    report.unused = unused
    return report


def classes_in(state: StateDict) -> int | None:
    """Return the number of classes of a file's head, in any of the layouts; None when it has none."""
    given, _ = release_names(state)
    head = given.get("head.weight")
    return None if head is None or head.ndim != 2 else len(head)


def classifier_to_official(model: Classifier) -> StateDict:
    """Return the weights as in the authors' fine-tuned files.

    Names: cls_token, pos_embed [1, 1 + L, D], patch_embed.proj.*, blocks.*, fc_norm.* (pooled by mean) or norm.* (by
    cls), head.*.

    Tensors are copies, on the model's device and in its dtype. A probe's BatchNorm, which that layout has no place
    for, is folded into the head: the logits of evaluation mode stay the same.
    """
    own = {key: value.detach().clone() for key, value in model.state_dict().items()}
    state = to_release(own, _CLASSIFIER)
    if isinstance(model.batch_norm, GlobalBatchNorm):
        mean, var = state.pop("batch_norm.running_mean"), state.pop("batch_norm.running_var")  # [D], [D]
        weight, bias = state["head.weight"], state["head.bias"]  # [C, D], [C]
        folded = weight.double() * torch.rsqrt(var.double() + model.batch_norm.eps)
        state["head.weight"] = folded.to(weight.dtype)
        state["head.bias"] = (bias.double() - folded @ mean.double()).to(bias.dtype)
    return state


def classifier_to_timm(model: Classifier) -> StateDict:
    """Return the weights by the names of timm's `VisionTransformer`, which are those of `classifier_to_official`.

    For the same sizes and num_classes, with global_pool="avg" for a classifier that pools by mean, "token" for cls.
    """
    return classifier_to_official(model)


def classifier_to_hf(model: Classifier) -> StateDict:
    """Return the weights by the names of Hugging Face's ViTForImageClassification (BeitForImageClassification) files.

    For `from_pretrained` with layer_norm_eps=1e-6 in its config; otherwise as `classifier_to_official`.
    Raises UsageError for a ViT's classifier that pools by mean.
    """
    if isinstance(model.encoder, BeitEncoder):
        return release_to_beit_hf(classifier_to_official(model))
    if model.pool == "mean":
        raise UsageError(
            "this classifier pools the mean of the patch tokens, Hugging Face's ViTForImageClassification only the "
            "cls token, so it would give other logits: export it in the layout official or timm "
            "(transformers' AutoModelForImageClassification opens timm's folder, too)"
        )
    return release_to_hf(classifier_to_official(model))


def release_names(state: StateDict) -> tuple[StateDict, str]:
    """Return the tensors by the release's names, and their layout's name; keys without a name there keep theirs.

    Raises UsageError for a detector or a segmenter, whose encoder computes something else.
    """
    if kind := dense_kind(state):
        raise UsageError(
            f"these are weights of {kind}, whose encoder has no cls token and other attention: give "
            "those that it was started from"
        )
    if is_beit(state):
        return beit_release_names(state), "BEiT"
    state = encoder_of_moco(state)
    if _has(state, "encoder.cls_token", "encoder.patch_embed.", "encoder.blocks."):
        if _has(state, "decoder."):  # then "head." predicts pixels
            return to_release(state, AUTOENCODER), _OUR_AUTOENCODER
        return to_release(state, _CLASSIFIER), "our own classifier"
    if _has(state, "vit.", "embeddings."):
        return hf_to_release(state), "Hugging Face"
    return dict(state), "the authors' release or timm"


def _has(state: StateDict, *beginnings: str) -> bool:
    return any(key.startswith(beginnings) for key in state)


def check_encoder(given: StateDict, *, takes_beit: bool) -> None:
    """Raise UsageError when a file has the other kind of encoder, ViT or BEiT, than the recipe's."""
    if takes_beit and not is_beit(given):
        raise UsageError(
            "these are no weights of a BEiT (which has blocks.0.gamma_1), and the recipe has model.encoder=beit: give "
            "those of a BEiT, or set model.encoder=vit and model.layer_scale=null"
        )
    if not takes_beit and is_beit(given):
        raise UsageError(
            "these are weights of a BEiT, and the recipe has model.encoder=vit: set model.encoder=beit and "
            "model.layer_scale, or give weights of a plain ViT"
        )


def _check_kind(model: Classifier, given: StateDict) -> None:
    """Raise UsageError when the file is a classifier with another pooling, other classes, or a BatchNorm more."""
    pool = "mean" if _has(given, "fc_norm.") else "cls"
    if pool != model.pool:
        norm = "an fc_norm" if pool == "mean" else "no fc_norm"
        raise UsageError(
            f"the file is a classifier that pools by {pool} (it has {norm}), this one pools by {model.pool}: "
            f"set classifier.pool={pool}, or give pre-trained weights without a head"
        )
    if _has(given, "batch_norm.") and not _has(model.state_dict(), "batch_norm."):
        raise UsageError(
            "the file is a linear probe with a BatchNorm before its head, this classifier has none: "
            "set classifier.batch_norm=true, or give pre-trained weights without a head"
        )
    head = given.get("head.weight")
    if head is not None and head.ndim == 2 and len(head) != model.classes:
        raise UsageError(
            f"the file's head has {len(head)} classes, the data {model.classes}: give data of those classes; "
            "for other classes give pre-trained weights without a head"
        )


def square_grid(patches: int) -> tuple[int, int] | None:
    """Return the rows and columns of a square of so many patches; None where no square has as many."""
    side = math.isqrt(max(0, patches))
    return (side, side) if side and side**2 == patches else None


def on_grid(positions: Tensor, grid: tuple[int, int], given_grid: tuple[int, int] | None) -> Tensor:
    """Resample [1, 1 + l, D] to float32 [1, 1 + L, D] of a grid; return them as they are if they fit or are no grid's.

    Raises UsageError when their own grid is not known, and their number is neither a square's nor the model's.
    """
    patches = positions.shape[1] - 1 if positions.ndim == 3 else 0
    of = given_grid or square_grid(patches) or grid
    if patches < 1 or (of == grid and patches == math.prod(grid)):
        return positions
    if patches != math.prod(of):
        raise UsageError(
            f"pos_embed is {list(positions.shape)}, expected [1, {1 + math.prod(grid)}, {positions.shape[2]}] of "
            f"{grid[0]} x {grid[1]} patches, or those of a square; for others give the run's folder or a checkpoint, "
            "whose recipe says their rows and columns"
        )
    return resample_abs_pos_embed(positions.float(), list(grid), list(of), antialias=False)
