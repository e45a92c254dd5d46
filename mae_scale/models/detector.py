"""Mask R-CNN (He et al., arXiv 1703.06870) on a dense encoder, from torchvision's parts, with ViTDet's heads.

ViTDet (Li et al., arXiv 2203.16527, appendix A.2): a region proposal network of two convolutions, a box head of four
convolutions and one linear layer, a mask head of four, with LayerNorm. torchvision's losses and matching stay, with
two differences, both so that a loss depends neither on the images beside it nor on ranks: each image goes through the
heads by itself, and its samples are drawn by a generator of its own. A batch's loss is the mean over its images.
(detectron2 averages a mask loss over the positive boxes of a GPU's images.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from mae_scale.models.dense import DenseEncoder, DenseModel, FeaturePyramid, MapNorm
from mae_scale.models.regions import Anchors, BoxPooler, strides_of

LEVELS = ("0", "1", "2", "3", "pool")
"""Names of the pyramid's maps, the finest first; boxes are pooled from all but the last."""
FINEST_ANCHOR = 2
"""Side of the finest map's anchors in patches: 32 px, 8 strides, for patches of 16 px. It doubles with each map."""
ASPECT_RATIOS = (0.5, 1.0, 2.0)
BOX_CELLS, MASK_CELLS = 7, 14


@dataclass(frozen=True)
class Instances:
    """The n objects of an image, in pixels of what the model sees: boxes float32 [n, 4] (x0, y0, x1, y1), labels int64
    [n] from 1 on, masks uint8 [n, H, W]."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor


class SeededSampler(BalancedPositiveNegativeSampler):  # type: ignore[misc]  # torchvision has no types
    """torchvision's sampler of positives and negatives, drawn by a generator that is set before its call."""

    generator: torch.Generator | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return which of each image's candidates are taken as positives and as negatives, uint8 [n] each.

        Of labels [n]: above 0 positive, 0 negative, -1 neither. At most `positive_fraction` are positive.
        """
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels in matched_idxs:
            positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
            most = min(len(positive), int(self.batch_size_per_image * self.positive_fraction))
            for taken, found, count in (
                (chosen[0], positive, most),
                (chosen[1], negative, min(len(negative), self.batch_size_per_image - most)),
            ):
                order = torch.randperm(len(found), device=labels.device, generator=self.generator)
                mask = torch.zeros_like(labels, dtype=torch.uint8)
                mask[found[order[:count]]] = 1
                taken.append(mask)
        return chosen


class Float32(nn.Module):
    """A head that computes in its parameters' precision, and takes and gives float32.

    Anchors, boxes and their matching have the precision of the maps and of the heads' outputs: in bf16 a coordinate
    of 1000 px would be one of 1000 and 1008.
    """

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, x: Tensor | list[Tensor]) -> object:
        """x: one map or several; returns what the head returns."""
        dtype = next(self.parameters()).dtype
        return _cast(self.head(_cast(x, dtype)), torch.float32)


def _cast(x: object, dtype: torch.dtype) -> object:
    if isinstance(x, Tensor):
        return x.to(dtype)
    return type(x)(_cast(one, dtype) for one in cast(Sequence[object], x))  # type: ignore[call-arg]


class MaskRcnn(DenseModel):
    """Mask R-CNN over the maps of a dense encoder; `classes` without the background.

    Of the best `proposals` boxes of each map (twice as many in training) those that do not overlap better ones are
    proposed, at most as many; the box head is trained on `sampled_boxes` of these, at most a quarter of them objects'.
    """

    def __init__(
        self,
        encoder: DenseEncoder,
        *,
        classes: int,
        channels: int = 256,
        proposals: int = 1000,
        sampled_boxes: int = 512,
    ):
        super().__init__()
        self.encoder, self.classes = encoder, classes
        self.pyramid = FeaturePyramid(encoder.size.width, channels)
        patch_size = encoder.size.patch_size
        strides = strides_of(patch_size, len(LEVELS))
        sides = [FINEST_ANCHOR * patch_size * 2**level for level in range(len(LEVELS))]
        anchors = Anchors(strides, sides, ASPECT_RATIOS)
        self.rpn = RegionProposalNetwork(
            anchors,
            Float32(RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        pooled = dict(zip(LEVELS[:-1], strides[:-1], strict=True))
        self.roi_heads = RoIHeads(
            BoxPooler(pooled, BOX_CELLS, patch_size),
            Float32(FastRCNNConvFCHead((channels, BOX_CELLS, BOX_CELLS), [channels] * 4, [4 * channels], MapNorm)),
            Float32(FastRCNNPredictor(4 * channels, 1 + classes)),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=sampled_boxes,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_roi_pool=BoxPooler(pooled, MASK_CELLS, patch_size),
            mask_head=Float32(MaskRCNNHeads(channels, [channels] * 4, dilation=1, norm_layer=MapNorm)),
            mask_predictor=Float32(MaskRCNNPredictor(channels, channels, 1 + classes)),
        )
        for part in (self.rpn, self.roi_heads):
            sampler = part.fg_bg_sampler
            part.fg_bg_sampler = SeededSampler(sampler.batch_size_per_image, sampler.positive_fraction)

    def losses(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        objects: Sequence[Instances],
        seeds: Tensor,
        branch_scales: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return each image's losses float32 [B]: loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg and
        loss_mask.

        images [B, 3, H, W], of which (height, width) in `sizes` is filled; seeds int64 [B] on the host draw each
        image's samples; branch_scales [B, depth, 2] as in the encoder.
        """
        found = []
        draws = torch.Generator(images.device)
        for part in (self.rpn, self.roi_heads):
            part.fg_bg_sampler.generator = draws
        maps = self._maps(images, branch_scales)
        for row, (own, size, one, seed) in enumerate(zip(maps, sizes, objects, seeds.tolist(), strict=True)):
            draws.manual_seed(seed)
            target = [{"boxes": one.boxes, "labels": one.labels, "masks": one.masks}]
            proposals, losses = self.rpn(ImageList(images[row : row + 1], [size]), own, target)
            _, more = self.roi_heads(own, proposals, [size], target)
            found.append(losses | more)
        return {name: torch.stack([losses[name] for losses in found]) for name in found[0]}

    def detect(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Return of each image its detections, the likeliest first: boxes float32 [n, 4] in pixels of the image, labels
        int64 [n], scores float32 [n], and masks float32 [n, 1, 28, 28] of probabilities within the box."""
        found, maps = [], self._maps(images, None)
        for row, (own, size) in enumerate(zip(maps, sizes, strict=True)):
            proposals, _ = self.rpn(ImageList(images[row : row + 1], [size]), own)
            found += self.roi_heads(own, proposals, [size])[0]
        return found

    def _maps(self, images: Tensor, branch_scales: Tensor | None) -> list[dict[str, Tensor]]:
        """Return each image's maps of the pyramid in float32, [1, C, h, w] by name."""
        (last,) = self.encoder(images, branch_scales)
        # Split and not sliced: the gradient of each slice would be as large as the whole batch's maps.
        levels = [level.float().split(1) for level in self.pyramid(last)]
        return [dict(zip(LEVELS, own, strict=True)) for own in zip(*levels, strict=True)]
