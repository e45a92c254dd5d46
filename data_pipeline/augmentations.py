"""The paper's augmentations (its ablation's rows, its fine-tuning): what is drawn an image, and the DALI operators
that apply it.

The numbers are drawn in `order`; only `resize_crop` and `jitter_colours`, inside a DALI graph, need DALI.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from mae_scale.errors import UsageError

if TYPE_CHECKING:
    from nvidia.dali.pipeline import DataNode

EVALUATION_CROP = 0.875  # 224 of 256, the share of the shorter side that a fixed-size crop keeps
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, the grey that Pillow and torchvision mean


@dataclass(frozen=True)
class Augmentation:
    """How images are cropped, flipped, coloured and erased.

    crop `random_resized`: torchvision's RandomResizedCrop with `scale` (share of the area) and `ratio` (width
    by height). crop `random` and `centre`: the shorter side is resized to int(image_size / 0.875), then a
    square of image_size is cut out at random or in the middle (torchvision's Resize with RandomCrop or
    CenterCrop). crop `whole`: the whole image is resized to the square. `flip` is the probability of a
    horizontal flip. `jitter` is the strength of brightness, contrast and saturation, as in torchvision's
    ColorJitter, applied in random order; 0 for none. `rand_augment`: the flipped image goes through RandAugment
    (`data_pipeline.rand_augment`). `erasing` is the probability that a box of the normalised image is filled with
    noise (`order.erasing_boxes`).
    """

    name: str
    crop: Literal["random_resized", "random", "centre", "whole"]
    flip: float = 0.5
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: float = 0.0
    rand_augment: bool = False
    erasing: float = 0.0


_KNOWN = {
    kind.name: kind
    for kind in (
        Augmentation("random_resized_crop", "random_resized"),
        # The paper gives no strengths; 0.4 without hue is the usual one of supervised ImageNet training.
        Augmentation("random_resized_crop_color_jitter", "random_resized", jitter=0.4),
        Augmentation("fixed_crop", "random"),
        Augmentation("none", "centre", flip=0.0),
        Augmentation("rand_augment", "random_resized", scale=(0.08, 1.0), rand_augment=True),
        Augmentation("evaluation", "centre", flip=0.0),
        Augmentation("evaluation_whole", "whole", flip=0.0),
    )
}


def augmentation(
    name: str, *, crop_scale: float | None = None, flip: float | None = None, erasing: float = 0.0
) -> Augmentation:
    """The augmentation of that name: random_resized_crop, random_resized_crop_color_jitter, fixed_crop, none
    (centre crop, no flip), rand_augment (fine-tuning's), evaluation (as none) or evaluation_whole (no crop either,
    for images that are cropped already).

    `crop_scale` replaces the smallest share of the area that a random resized crop takes, `flip` the probability
    of a flip; `erasing` is the probability of random erasing. Raises UsageError for another name, a share
    outside (0, 1] or for a kind with another crop, and a probability outside [0, 1].
    """
    if name not in _KNOWN:
        raise UsageError(f"unknown augmentation '{name}'; expected one of {', '.join(_KNOWN)}")
    kind = _KNOWN[name]
    if crop_scale is not None:
        if kind.crop != "random_resized":
            raise UsageError(f"crop_scale is {crop_scale}, but augmentation '{name}' has no random resized crop")
        if not 0 < crop_scale <= 1:
            raise UsageError(f"crop_scale is {crop_scale}; expected a share of the area above 0, at most 1")
        kind = replace(kind, scale=(crop_scale, kind.scale[1]))
    if flip is not None:
        kind = replace(kind, flip=flip)
    kind = replace(kind, erasing=erasing)
    for option in ("flip", "erasing"):
        if not 0 <= getattr(kind, option) <= 1:
            raise UsageError(f"{option} is {getattr(kind, option)}; expected a probability, 0 to 1")
    return kind


def jitter_slots(factors: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(levels float32 [n, 4, 2], saturation float32 [n]) of factors [n, 3] applied in order [n, 3].

    Brightness and contrast fall before or after saturation, each side in their order: slots 0 and 1 come
    before it, 2 and 3 after. A slot multiplies by its first number and adds (its second number) x the mean
    grey.
    """
    n = len(factors)
    levels = np.tile(np.array([1, 0], np.float32), (n, 4, 1))
    place = np.argsort(order, axis=1)  # place[i, k]: when operation k is applied; 0 brightness, 1 contrast
    for operation in (0, 1):
        factor = factors[:, operation]
        slot = np.where(place[:, operation] < place[:, 2], place[:, operation], 1 + place[:, operation])
        levels[np.arange(n), slot, 0] = factor
        levels[np.arange(n), slot, 1] = (1 - factor) * operation
    return levels, factors[:, 2].astype(np.float32)


def jitter_colours(images: DataNode, levels: DataNode, saturation: DataNode) -> DataNode:
    """DALI: uint8 RGB images with the factors of `jitter_slots`, clipped to uint8 after each operation."""
    from nvidia.dali import fn, types

    for slot in range(4):
        if slot == 2:
            images = fn.saturation(images, saturation=saturation)
        grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        mean = fn.reductions.mean(grey).cpu()  # arguments of operators are read on the host
        images = fn.brightness_contrast(
            images,
            contrast=levels[slot, 0],
            contrast_center=0.0,
            brightness_shift=levels[slot, 1] * mean / 255.0,
            dtype=types.UINT8,
        )
    return images


def resize_crop(images: DataNode, start: DataNode, end: DataNode, image_size: int) -> DataNode:
    """DALI: the region from `start` to `end` (y, x in pixels of `images`, fractions allowed) as a square of
    `image_size`, cubic with antialias; what lies around the region takes part in the filter."""
    from nvidia.dali import fn, types

    return fn.resize(
        images,
        size=[image_size, image_size],
        interp_type=types.INTERP_CUBIC,
        antialias=True,
        roi_start=start,
        roi_end=end,
    )
