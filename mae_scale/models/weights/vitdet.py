"""Weights of Mask R-CNN on a plain ViT in ViTDet's published layout: detectron2's, projects/ViTDet, read and written.

Source: facebookresearch/detectron2 (modeling/backbone/vit.py, proposal_generator/rpn.py, roi_heads/,
configs/common/models/mask_rcnn_vitdet.py). Of K classes, patches of p px, C channels, from a map of width D:

    backbone.net.*                    the encoder by timm's names; positions [1, 1 + L, D], of which no forward reads
                                      the first, that of a cls token; tables of relative positions [2 n - 1, d]
    backbone.simfp_S.*                S = log2 of a map's stride: 2 to 5 for p = 16. Rescaling (0, or 0, 1 and 3), then
                                      the 1 x 1 and the 3 x 3 convolution, each with its LayerNorm as `norm`
    proposal_generator.rpn_head.*     conv.conv0, conv.conv1, objectness_logits [3, C, 1, 1], anchor_deltas
                                      [12, C, 1, 1]: aspect ratios (height / width) 0.5, 1, 2, of each dx, dy, dw, dh
    roi_heads.box_head.*              conv1 to conv4, each with `norm`; fc1 [4 C, 49 C], of (channel, row, column)
    roi_heads.box_predictor.*         cls_score [K + 1, 4 C], the background last; bbox_pred [4 K, 4 C]
    roi_heads.mask_head.*             mask_fcn1 to mask_fcn4, each with `norm`; deconv [C, C, 2, 2]; predictor
                                      [K, C, 1, 1]

Here the background is class 0, and boxes and masks have rows for it too, which nothing reads: they are zeros after a
load and are not written. detectron2's class k is our label k + 1, as both order COCO's categories by their ids. Pixels
agree: RGB, ImageNet's mean and std, zeros beyond the image. So do positions, windows, the pyramid, the box coders'
weights and limit, matching, sampling, the number of proposals of a map before suppression and of an image after it,
anchors and the alignment of pooled boxes, and the thresholds of scores and suppression.

What differs (what published weights reach here has not been measured):

- Training: torchvision's loss of boxes is smooth below 1/9, detectron2's is L1; mask targets are shares, theirs 0 or 1
  of polygons rasterised in the box. (Their mask loss is a mean over a GPU's images, and they train with one per GPU.)
- Images are resampled by another filter (theirs is Pillow's bilinear), and masks pasted by whoever evaluates.

LVIS's files have classes scored by a sigmoid and Cascade R-CNN's three box heads: neither is this model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from mae_scale.models.detector import MaskRcnn
from mae_scale.models.weights.checked_copy import LoadReport, check_same, check_size, copy_weights
from mae_scale.models.weights.files import StateDict
from mae_scale.models.weights.layouts import ENCODER, Names, from_release, to_release

_NET = "backbone.net."
_SCORES = "roi_heads.box_predictor.cls_score."
_OF_CLASSES = {"roi_heads.box_predictor.bbox_pred.": 4, "roi_heads.mask_head.predictor.": 1}
"""Layers with rows for each class but the background, and how many."""
_UNUSED = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.")
"""Buffers of older files."""
_FIRST_CONVOLUTION = (4, 1, 0, 1)
"""Place of the 1 x 1 convolution in simfp_S, the finest map first."""


def is_vitdet(state: StateDict) -> bool:
    """Return whether weights have ViTDet's names."""
    return any(name.startswith(_NET) for name in state)


def detector_to_vitdet(model: MaskRcnn) -> StateDict:
    """Return the weights by detectron2's names, copies on the model's device and in its dtype.

    The cls token's position, which detectron2 has and does not read, is zero. Raises UsageError for BEiT's encoder, and
    for a patch whose side is no power of two from 4 on.
    """
    return {key: value.detach().clone() for key, value in _to_vitdet(model, model.state_dict()).items()}


def load_vitdet(model: MaskRcnn, state: StateDict) -> LoadReport:
    """Copy the tensors of a file (`read_weights`) in ViTDet's layout into the model; in its own dtype, on its device.

    Nothing is resampled: positions stay on the grid of `pretraining_size`, tables of relative positions on that of
    `image_size` (224 and 1024 px in the published files); forward() resamples both for images of other sizes.
    Raises UsageError, with nothing copied, as detector_to_vitdet does and for a file of another size or number of
    classes; keys that are missing or unexpected, shapes that do not fit.
    """
    own = model.state_dict(keep_vars=True)
    unused = [key for key in state if key.startswith(_UNUSED)]
    given = {key: value for key, value in state.items() if key not in unused}
    expected = _to_vitdet(model, own)
    check_size(_without(_NET, given), model.encoder.size)
    _check_classes(given, expected)
    check_same(
        given,
        expected,
        layout="ViTDet's Mask R-CNN",
        advice="give a whole file of Mask R-CNN (not Cascade R-CNN) on a plain ViT, and build the model with its image "
        "size, pre-training size, window and global blocks",
    )
    report = copy_weights(own, _from_vitdet(model, given))
    report.unused = unused
    return report


def _to_vitdet(model: MaskRcnn, state: StateDict) -> StateDict:
    """Return ours -> detectron2's, views where possible. Raises UsageError where its layout has no name for a part."""
    if model.encoder.pos_embed is None:
        raise UsageError("ViTDet's layout has no names for BEiT's encoder; use our own (--format safetensors)")
    encoder = to_release({key: value for key, value in state.items() if key.startswith("encoder.")}, ENCODER)
    positions = encoder["pos_embed"]  # [1, L, D]
    encoder["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    rest = {key: value for key, value in state.items() if not key.startswith("encoder.")}
    heads = {key: _background_last(key, value) for key, value in to_release(rest, _heads(model)).items()}
    return {_NET + key: value for key, value in encoder.items()} | heads


def _from_vitdet(model: MaskRcnn, given: StateDict) -> StateDict:
    """Return detectron2's -> ours; every key has a name of ours."""
    encoder = _without(_NET, given)
    encoder["pos_embed"] = encoder["pos_embed"][:, 1:]
    rest = {key: _background_first(key, value) for key, value in given.items() if not key.startswith(_NET)}
    return from_release(encoder, ENCODER) | from_release(rest, _heads(model))


def _background_last(key: str, value: Tensor) -> Tensor:
    """Return rows of the background and the K classes as detectron2 has them: last, or not at all."""
    if key.startswith(_SCORES):
        return value.roll(-1, dims=0)
    return next((value[rows:] for layer, rows in _OF_CLASSES.items() if key.startswith(layer)), value)


def _background_first(key: str, value: Tensor) -> Tensor:
    """Return the inverse of _background_last, with zeros where there was nothing."""
    if key.startswith(_SCORES):
        return value.roll(1, dims=0)
    for layer, rows in _OF_CLASSES.items():
        if key.startswith(layer):
            return torch.cat([torch.zeros_like(value[:1]).expand(rows, *value.shape[1:]), value])
    return value


def _heads(model: MaskRcnn) -> Names:
    """Return the beginnings of keys outside the encoder: ours, detectron2's. Longer ones come before what begins them.

    Raises UsageError for a patch whose side is no power of two from 4 on.
    """
    patch = model.encoder.size.patch_size
    finest = round(math.log2(patch)) - 2
    if patch < 4 or 2 ** (finest + 2) != patch:
        raise UsageError(
            f"ViTDet's layout names maps by the power of two of their stride; patches of {patch} px have no such name: "
            "use patches of 4, 8 or 16 px"
        )
    names: list[tuple[str, str]] = []
    for level, first in enumerate(_FIRST_CONVOLUTION):
        ours, theirs = f"pyramid.heads.{level}.", f"backbone.simfp_{finest + level}."
        for number in range(2):
            place = f"{theirs}{first + number}."
            names += [(f"{ours}{2 * number + 1}.", f"{place}norm."), (f"{ours}{2 * number}.", place)]
    box, mask = "roi_heads.box_head.", "roi_heads.mask_head."
    for number in range(4):
        for ours, theirs in ((f"{box}head.", f"{box}conv"), (f"{mask}head.", f"{mask}mask_fcn")):
            names += [
                (f"{ours}{number}.1.", f"{theirs}{number + 1}.norm."),
                (f"{ours}{number}.0.", f"{theirs}{number + 1}."),
            ]
    rpn, theirs = "rpn.head.head.", "proposal_generator.rpn_head."
    return (
        *names,
        ("pyramid.scales.0.", f"backbone.simfp_{finest}."),
        ("pyramid.scales.1.", f"backbone.simfp_{finest + 1}.0."),
        (f"{rpn}conv.0.0.", f"{theirs}conv.conv0."),
        (f"{rpn}conv.1.0.", f"{theirs}conv.conv1."),
        (f"{rpn}cls_logits.", f"{theirs}objectness_logits."),
        (f"{rpn}bbox_pred.", f"{theirs}anchor_deltas."),
        (f"{box}head.5.", f"{box}fc1."),
        ("roi_heads.box_predictor.head.", "roi_heads.box_predictor."),
        ("roi_heads.mask_predictor.head.conv5_mask.", f"{mask}deconv."),
        ("roi_heads.mask_predictor.head.mask_fcn_logits.", f"{mask}predictor."),
    )


def _without(prefix: str, state: StateDict) -> StateDict:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _check_classes(given: StateDict, expected: StateDict) -> None:
    """Raise UsageError when the file has another number of classes."""
    found, wanted = given.get(f"{_SCORES}bias"), expected[f"{_SCORES}bias"]
    if found is not None and found.shape != wanted.shape:
        raise UsageError(
            f"the file's detector has {found.numel() - 1} classes, this one {wanted.numel() - 1}: give data of those "
            "classes, or start from pre-trained weights of the encoder"
        )
