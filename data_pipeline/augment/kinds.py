"""The kinds of augmentation that a recipe can name: the paper's ablation, its fine-tuning, and evaluation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from data_pipeline.errors import UsageError
from data_pipeline.image_size import ImageSize


@dataclass(frozen=True)
class Augmentation:
    """The crop, flip, colours and erasing of images.

    crop `random_resized`: torchvision's RandomResizedCrop with `scale` (share of the area) and `ratio` (width
    by height). crop `random` and `centre`: the image is resized, its proportions kept, until it just covers
    int(height / 0.875) x int(width / 0.875) of the output, then the output's size is cut out at random or at the centre
    (for a square torchvision's Resize of the shorter side, with RandomCrop or CenterCrop). crop `whole`: the whole
    image is resized to the output. crop `scaled`, of square outputs: the image is resized by a factor from `scale` of
    what just fits, cut to the square or filled up below and to the right; with `by_shorter` by a factor of what makes
    its shorter side that of the square. crop `unbounded`: as that with the factor 1, and nothing is cut or filled up,
    so that outputs differ in size. `flip` is the probability of a horizontal flip. `jitter` are the strengths of
    brightness, contrast and saturation, as in torchvision's
    ColorJitter, applied in random order, and of hue, in turns; 0 for none. `jittered` is the probability of jitter,
    `grey` that of a grey image instead of a coloured one, `blur` that of a Gaussian blur of `sigma` (px of a 224 px
    image, in proportion to the shorter side of other sizes), `solarised` that of turning levels from 128 on into their
    negative. `rand_augment`: the flipped image goes through RandAugment. `erasing` is the probability that a box of the
    normalised image is filled with noise.
    """

    name: str
    crop: Literal["random_resized", "random", "centre", "whole", "scaled", "unbounded"]
    by_shorter: bool = False
    flip: float = 0.5
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jittered: float = 1.0
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarised: float = 0.0
    rand_augment: bool = False
    erasing: float = 0.0

    @property
    def colours(self) -> bool:
        """Return whether brightness, contrast, saturation or hue may change."""
        return any(self.jitter) or self.grey > 0


@dataclass(frozen=True)
class SecondView:
    """A second view of each image: its augmentation, and its size in pixels.

    Without an augmentation it has the crop, flip and colours of the first view. `normalised`: by ImageNet's mean and
    std as the first view; otherwise values are from 0 to 1.
    """

    augmentation: Augmentation | None
    image_size: ImageSize
    normalised: bool = True


_MOCO_V3 = Augmentation(
    "moco_v3", "random_resized", scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.2, 0.1), jittered=0.8, grey=0.2, blur=1.0
)
_KNOWN = {
    kind.name: kind
    for kind in (
        Augmentation("random_resized_crop", "random_resized"),
        # The paper gives no strengths; 0.4 without hue is usual in supervised ImageNet training.
        Augmentation("random_resized_crop_color_jitter", "random_resized", jitter=(0.4, 0.4, 0.4, 0.0)),
        Augmentation("fixed_crop", "random"),
        Augmentation("large_scale_jitter", "scaled", scale=(0.1, 2.0)),
        # Of mmsegmentation's distortion of colours, where each of its four parts is made with probability 0.5.
        Augmentation(
            "scale_jitter", "scaled", by_shorter=True, scale=(0.5, 2.0), jitter=(0.125, 0.5, 0.5, 0.05), jittered=0.5
        ),
        Augmentation("none", "centre", flip=0.0),
        Augmentation("rand_augment", "random_resized", scale=(0.08, 1.0), rand_augment=True),
        _MOCO_V3,
        replace(_MOCO_V3, name="moco_v3_second", blur=0.1, solarised=0.2),
        Augmentation("evaluation", "centre", flip=0.0),
        Augmentation("evaluation_whole", "whole", flip=0.0),
        Augmentation("evaluation_fit", "scaled", scale=(1.0, 1.0), flip=0.0),
        Augmentation("evaluation_unbounded", "unbounded", flip=0.0),
    )
}


def augmentation(
    name: str,
    *,
    crop_scale: float | None = None,
    scale_range: tuple[float, float] | None = None,
    flip: float | None = None,
    erasing: float = 0.0,
) -> Augmentation:
    """Return the augmentation called `name`: random_resized_crop, random_resized_crop_color_jitter, fixed_crop, none
    (centre crop, no flip), rand_augment (fine-tuning's), moco_v3 and moco_v3_second (of a pair of views, Chen et al.,
    arXiv 2104.02057), large_scale_jitter and scale_jitter (of dense tasks), evaluation (as none), evaluation_whole (no
    crop either, for images that are cropped already), evaluation_fit (the whole image, its proportions kept) or
    evaluation_unbounded (the same, its shorter side resized to the square's).

    `crop_scale` replaces the smallest share of the area that a random resized crop takes, `scale_range` the smallest
    and largest factor of a scale jitter, `flip` the probability of a flip; `erasing` is the probability of random
    erasing. Raises UsageError for an unknown name, a share outside (0, 1] or without a random resized crop, factors
    that are none or without a scale jitter, and a probability outside [0, 1].
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
    if scale_range is not None:
        if kind.crop != "scaled":
            raise UsageError(f"scale_range is {scale_range}, but augmentation '{name}' has no scale jitter")
        if not 0 < scale_range[0] <= scale_range[1]:
            raise UsageError(f"scale_range is {scale_range}; expected two factors above 0, the smaller one first")
        kind = replace(kind, scale=scale_range)
    if flip is not None:
        kind = replace(kind, flip=flip)
    kind = replace(kind, erasing=erasing)
    for option in ("flip", "erasing"):
        if not 0 <= getattr(kind, option) <= 1:
            raise UsageError(f"{option} is {getattr(kind, option)}; expected a probability, 0 to 1")
    return kind
