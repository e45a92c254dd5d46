"""Mask R-CNN (He et al., arXiv 1703.06870) on a dense encoder, from torchvision's parts, with ViTDet's heads.

ViTDet (Li et al., arXiv 2203.16527, appendix A.2): a region proposal network of two convolutions, a box head of four
convolutions and one linear layer, a mask head of four, with LayerNorm. torchvision's losses and matching stay, with
two differences, both so that a loss depends neither on the images beside it nor on ranks: each image has losses of its
own, and its samples are drawn by a generator of its own. A batch's loss is the mean over its images. (torchvision and
detectron2 average over the samples of a GPU's images.) The maps and boxes of all images go through the heads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, project_masks_on_boxes
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from mae_scale.models.dense import DenseEncoder, DenseModel, FeaturePyramid, MapNorm
from mae_scale.models.regions import Anchors, BoxPooler, strides_of

LEVELS = ("0", "1", "2", "3", "pool")
"""Names of the pyramid's maps, the finest first; boxes are pooled from all but the last."""
FINEST_ANCHOR = 2
"""Side of the finest map's anchors in patches: 32 px, 8 strides, for patches of 16 px. It doubles with each map."""
ASPECT_RATIOS = (0.5, 1.0, 2.0)
BOX_CELLS, MASK_CELLS = 7, 14
SMOOTH_BELOW = 1 / 9
"""Up to where the loss of boxes is a square, in units of the coded box: torchvision's."""


@dataclass(frozen=True)
class Instances:
    """The n objects of an image, in pixels of what the model sees: boxes float32 [n, 4] (x0, y0, x1, y1), labels int64
    [n] from 1 on, masks uint8 [n, H, W]."""

    boxes: Tensor
    labels: Tensor
    masks: Tensor


class SeededSampler(BalancedPositiveNegativeSampler):  # type: ignore[misc]  # torchvision has no types
    """torchvision's sampler of positives and negatives, drawn by generators that are set before its call."""

    generators: Sequence[torch.Generator] = ()
    """One for each image."""

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return which of each image's candidates are taken as positives and as negatives, uint8 [n] each.

        Of labels [n]: above 0 positive, 0 negative, -1 neither. At most `positive_fraction` are positive.
        """
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels, generator in zip(matched_idxs, self.generators, strict=True):
            positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
            most = min(len(positive), int(self.batch_size_per_image * self.positive_fraction))
            for taken, found, count in (
                (chosen[0], positive, most),
                (chosen[1], negative, min(len(negative), self.batch_size_per_image - most)),
            ):
                order = torch.randperm(len(found), device=labels.device, generator=generator)
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


def _sums(values: Tensor, image: Tensor, images: int) -> Tensor:
    """Return the sums of each image's own of values [n], float32 [images]; image int64 [n] says whose they are.

    In the same order each time, where a GPU's index_add has none.
    """
    own = image == torch.arange(images, device=image.device)[:, None]  # [images, n]
    return torch.where(own, values, 0.0).sum(1)


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's region proposal network, whose losses are each image's."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of objectness and of boxes, float32 [B] each.

        objectness [B A, 1] and deltas [B A, 4] of A anchors; of each image labels [A] (1: an object, 0: background, -1:
        neither) and what the deltas are to be [A, 4].
        """
        positive, negative = (torch.stack(taken).bool() for taken in self.fg_bg_sampler(labels))  # [B, A]
        images, anchors = positive.shape
        sampled = torch.where((positive | negative).flatten())[0]
        count = (positive | negative).sum(1)  # [B]
        wrong = functional.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled], reduction="none"
        )
        found = torch.where(positive.flatten())[0]
        off = functional.smooth_l1_loss(
            pred_bbox_deltas[found], torch.cat(regression_targets)[found], beta=SMOOTH_BELOW, reduction="none"
        )
        return (
            _sums(wrong, sampled // anchors, images) / count,
            _sums(off.sum(1), found // anchors, images) / count,
        )


class BoxAndMaskHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's heads of proposed boxes and of masks, whose losses are each image's."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: Sequence[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the detections of each image and no losses; with targets no detections, and losses [B] by name."""
        if targets is None:
            return super().forward(features, proposals, image_shapes)
        boxes, matched, labels, deltas = self.select_training_samples(proposals, targets)
        return [], self._box_losses(features, boxes, labels, deltas) | {
            "loss_mask": self._mask_loss(features, boxes, labels, matched, targets)
        }

    def _box_losses(
        self, maps: dict[str, Tensor], boxes: list[Tensor], labels: list[Tensor], deltas: list[Tensor]
    ) -> dict[str, Tensor]:
        """Return the losses [B] of classes and of boxes, of each image's samples.

        Their boxes [n, 4], labels [n] (0: background), and what the coded boxes are to be [n, 4].
        """
        image, label = _numbered(labels), torch.cat(labels)
        scores, found = self.box_predictor(self.box_head(self.box_roi_pool(maps, boxes, None)))
        wrong = functional.cross_entropy(scores, label, reduction="none")
        count = _sums(torch.ones_like(wrong), image, len(labels)).clamp(min=1)
        objects = torch.where(label > 0)[0]
        off = functional.smooth_l1_loss(
            found.unflatten(1, (-1, 4))[objects, label[objects]],
            torch.cat(deltas)[objects],
            beta=SMOOTH_BELOW,
            reduction="none",
        )
        return {
            "loss_classifier": _sums(wrong, image, len(labels)) / count,
            "loss_box_reg": _sums(off.sum(1), image[objects], len(labels)) / count,
        }

    def _mask_loss(
        self,
        maps: dict[str, Tensor],
        boxes: list[Tensor],
        labels: list[Tensor],
        matched: list[Tensor],
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        """Return the losses [B] of the masks in those samples that are objects; `matched` [n]: which of an image's."""
        objects = [torch.where(label > 0)[0] for label in labels]
        boxes, labels, matched = (
            [one[rows] for one, rows in zip(column, objects, strict=True)] for column in (boxes, labels, matched)
        )
        image, label = _numbered(labels), torch.cat(labels)
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(maps, boxes, None)))  # [n, classes, 28, 28]
        seen = [
            project_masks_on_boxes(target["masks"], box, which, logits.shape[-1])
            for target, box, which in zip(targets, boxes, matched, strict=True)
        ]
        own = logits[torch.arange(len(label), device=label.device), label]
        wrong = functional.binary_cross_entropy_with_logits(own, torch.cat(seen), reduction="none").mean((1, 2))
        count = _sums(torch.ones_like(wrong), image, len(labels)).clamp(min=1)
        return _sums(wrong, image, len(labels)) / count


def _numbered(labels: list[Tensor]) -> Tensor:
    """Return the number of the image that each label is of, int64 [n]."""
    return torch.cat([torch.full_like(one, number) for number, one in enumerate(labels)])


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
        self.rpn = ProposalNetwork(
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
        self.roi_heads = BoxAndMaskHeads(
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
        generators = [torch.Generator(images.device).manual_seed(seed) for seed in seeds.tolist()]
        for part in (self.rpn, self.roi_heads):
            part.fg_bg_sampler.generators = generators
        targets = [{"boxes": one.boxes, "labels": one.labels, "masks": one.masks} for one in objects]
        maps = self._maps(images, branch_scales)
        proposals, losses = self.rpn(ImageList(images, list(sizes)), maps, targets)
        _, more = self.roi_heads(maps, proposals, sizes, targets)
        return {**losses, **more}

    def detect(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Return of each image its detections, the likeliest first: boxes float32 [n, 4] in pixels of the image, labels
        int64 [n], scores float32 [n], and masks float32 [n, 1, 28, 28] of probabilities within the box.

        Each image goes through the heads by itself, so that its detections do not depend on those beside it.
        """
        found, maps = [], self._maps(images, None)
        for row, size in enumerate(sizes):
            own = {name: level[row : row + 1] for name, level in maps.items()}
            proposals, _ = self.rpn(ImageList(images[row : row + 1], [size]), own)
            found += self.roi_heads(own, proposals, [size])[0]
        return found

    def _maps(self, images: Tensor, branch_scales: Tensor | None) -> dict[str, Tensor]:
        """Return the maps of the pyramid in float32, [B, C, h, w] by name."""
        (last,) = self.encoder(images, branch_scales)
        return {name: level.float() for name, level in zip(LEVELS, self.pyramid(last), strict=True)}
