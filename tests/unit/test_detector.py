"""Mask R-CNN on the dense encoder: torchvision's losses and detections of each image, whatever is beside it."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from mae_scale.models.dense import DenseEncoder, MapNorm
from mae_scale.models.detector import ASPECT_RATIOS, LEVELS, Instances, MaskRcnn, SeededSampler
from mae_scale.models.vit import ViTSize

SIDE, CLASSES, CHANNELS = 64, 3, 16
SIZES = [(64, 64), (64, 40), (48, 64)]
SEEDS = torch.tensor([5, 6, 7])


@pytest.fixture(scope="module")
def model() -> MaskRcnn:
    torch.manual_seed(0)
    size = ViTSize(patch_size=8, width=32, depth=2, heads=2)
    encoder = DenseEncoder(size, image_size=(SIDE, SIDE), pretraining_size=SIDE, window=4, global_blocks=(1,))
    return MaskRcnn(encoder, classes=CLASSES, channels=CHANNELS)


@pytest.fixture(scope="module")
def scenes():
    """Three images, the second with two objects, the last without any."""
    draws = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, SIDE, SIDE, generator=draws)
    boxes = [[[8, 8, 40, 30]], [[4, 4, 20, 20], [10, 20, 38, 60]], []]
    objects = []
    for of_image in boxes:
        masks = torch.zeros(len(of_image), SIDE, SIDE, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, of_image, strict=True):
            mask[y0:y1, x0 + 2 : x1 - 2] = 1
        labels = torch.arange(1, len(of_image) + 1)
        objects.append(Instances(torch.tensor(of_image, dtype=torch.float32).reshape(-1, 4), labels, masks))
    return images, objects


class Backbone(nn.Module):
    """What torchvision's Mask R-CNN takes: a dictionary of maps."""

    def __init__(self, model: MaskRcnn):
        super().__init__()
        self.model, self.out_channels = model, CHANNELS

    def forward(self, images):
        return OrderedDict(zip(LEVELS, self.model.pyramid(self.model.encoder(images)[0]), strict=True))


def torchvisions(model: MaskRcnn) -> MaskRCNN:
    """torchvision's own Mask R-CNN around the same encoder, its heads built as theirs and given our weights.

    Anchors and pooling are ours (tests/unit/test_regions.py).
    """
    pooling = MultiScaleRoIAlign(LEVELS[:-1], 7, sampling_ratio=2)
    peer = MaskRCNN(
        Backbone(model),
        rpn_anchor_generator=AnchorGenerator(((8,),) * 5, (ASPECT_RATIOS,) * 5),
        rpn_head=RPNHead(CHANNELS, 3, conv_depth=2),
        rpn_post_nms_top_n_train=1000,
        box_roi_pool=pooling,
        box_head=FastRCNNConvFCHead((CHANNELS, 7, 7), [CHANNELS] * 4, [4 * CHANNELS], MapNorm),
        box_predictor=FastRCNNPredictor(4 * CHANNELS, 1 + CLASSES),
        mask_roi_pool=pooling,
        mask_head=MaskRCNNHeads(CHANNELS, [CHANNELS] * 4, dilation=1, norm_layer=MapNorm),
        mask_predictor=MaskRCNNPredictor(CHANNELS, CHANNELS, 1 + CLASSES),
    )
    peer.rpn.anchor_generator = model.rpn.anchor_generator
    peer.roi_heads.box_roi_pool = model.roi_heads.box_roi_pool
    peer.roi_heads.mask_roi_pool = model.roi_heads.mask_roi_pool
    for part in ("rpn", "roi_heads"):
        ours = {name.replace(".head.", "."): value for name, value in getattr(model, part).state_dict().items()}
        names = getattr(peer, part).state_dict()
        if part == "rpn":
            ours = {f"head.{name.removeprefix('head.')}": value for name, value in ours.items()}
        getattr(peer, part).load_state_dict({name: ours[name] for name in names})
    return peer


def losses_of(model, scenes, rows, seeds=SEEDS):
    images, objects = scenes
    return model.train().losses(images[rows], [SIZES[row] for row in rows], [objects[row] for row in rows], seeds[rows])


@pytest.mark.parametrize("row", [0, 1])
def test_an_images_losses_and_their_gradients_are_torchvisions(model, scenes, row):
    images, objects = scenes
    ours = losses_of(model, scenes, [row])
    peer = torchvisions(model).train()
    draws = torch.Generator().manual_seed(int(SEEDS[row]))
    for part in (peer.rpn, peer.roi_heads):
        sampler = part.fg_bg_sampler
        part.fg_bg_sampler = SeededSampler(sampler.batch_size_per_image, sampler.positive_fraction)
        part.fg_bg_sampler.generators = [draws]
    one = objects[row]
    target = [{"boxes": one.boxes, "labels": one.labels, "masks": one.masks}]
    features = peer.backbone(images[row : row + 1])
    proposals, expected = peer.rpn(ImageList(images[row : row + 1], [SIZES[row]]), features, target)
    expected |= peer.roi_heads(features, proposals, [SIZES[row]], target)[1]
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert ours[name].shape == (1,)
        assert ours[name][0].item() == pytest.approx(value.item(), rel=1e-6), name
    (mine,) = torch.autograd.grad(sum(ours.values()).sum(), [model.encoder.pos_embed])
    (theirs,) = torch.autograd.grad(sum(expected.values()), [model.encoder.pos_embed])
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7)


def test_an_images_losses_do_not_depend_on_those_beside_it_and_follow_its_seed(model, scenes):
    together = losses_of(model, scenes, [0, 1, 2])
    for row in range(3):
        alone = losses_of(model, scenes, [row])
        for name, values in together.items():
            assert values[row].item() == pytest.approx(alone[name][0].item(), rel=1e-5), name
    again, other = losses_of(model, scenes, [1]), losses_of(model, scenes, [1], SEEDS + 1)
    assert again["loss_objectness"] == losses_of(model, scenes, [1])["loss_objectness"]
    assert again["loss_objectness"] != other["loss_objectness"]


def test_an_image_without_objects_has_no_loss_of_boxes_and_masks_and_every_parameter_a_gradient(model, scenes):
    found = losses_of(model, scenes, [2])
    assert found["loss_rpn_box_reg"] == found["loss_box_reg"] == found["loss_mask"] == 0
    assert found["loss_objectness"] > 0
    model.zero_grad()
    sum(found.values()).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == set()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_an_image_without_objects_and_proposals_has_a_loss_of_zero(model, scenes):
    """Beside one that has them, whose losses stay its own."""
    images, objects = scenes
    targets = [{"boxes": one.boxes, "labels": one.labels, "masks": one.masks} for one in (objects[0], objects[2])]
    proposals = [torch.tensor([[8.0, 8, 40, 30], [1, 1, 9, 9]]), torch.empty(0, 4)]
    heads = model.train().roi_heads
    maps = model._maps(images[[0, 2]], None)
    both, alone = ({}, {})
    for rows, found in (([0, 1], both), ([0], alone)):
        heads.fg_bg_sampler.generators = [torch.Generator().manual_seed(row) for row in rows]
        own = {name: level[rows] for name, level in maps.items()}
        found |= heads(own, [proposals[row] for row in rows], SIZES[:2], [targets[row] for row in rows])[1]
    for name, values in both.items():
        assert values[1] == 0, name
        assert values[0].item() == pytest.approx(alone[name][0].item(), rel=1e-5), name
        assert values[0] > 0, name


def test_in_bf16_boxes_stay_float32_and_losses_near(model, scenes):
    images, objects = scenes
    exact = losses_of(model, scenes, [0, 1])
    rounded = copy.deepcopy(model).bfloat16().train()
    found = rounded.losses(images[:2].bfloat16(), SIZES[:2], objects[:2], SEEDS[:2])
    for name, values in exact.items():
        assert found[name].dtype == torch.float32
        assert torch.allclose(found[name], values, rtol=0.2, atol=0.02), name
    detections = rounded.eval().detect(images[:1].bfloat16(), SIZES[:1])
    assert detections[0]["boxes"].dtype == torch.float32


@pytest.mark.parametrize(("patch", "sides"), [(16, [32, 64, 128, 256, 512]), (14, [28, 56, 112, 224, 448])])
def test_anchors_are_eight_strides_wide_as_vitdets(patch, sides):
    size = ViTSize(patch_size=patch, width=32, depth=2, heads=2)
    side = 4 * patch
    encoder = DenseEncoder(size, image_size=(side, side), pretraining_size=side, window=2, global_blocks=(1,))
    anchors = MaskRcnn(encoder, classes=CLASSES, channels=CHANNELS).rpn.anchor_generator
    assert list(anchors.sides) == sides


@pytest.mark.slow
def test_it_learns_a_scene_and_finds_its_objects(scenes):
    torch.manual_seed(0)
    size = ViTSize(patch_size=8, width=32, depth=2, heads=2)
    encoder = DenseEncoder(size, image_size=(SIDE, SIDE), pretraining_size=SIDE, window=4, global_blocks=(1,))
    model = MaskRcnn(encoder, classes=CLASSES, channels=CHANNELS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images, objects = scenes
    for step in range(150):
        losses = losses_of(model, scenes, [0, 1], SEEDS + 10 * step)
        optimizer.zero_grad()
        sum(losses.values()).mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        found = model.detect(images[:2], SIZES[:2])
    for one, expected in zip(found, objects[:2], strict=True):
        count = len(expected.labels)
        best = one["scores"][:count]
        assert (best > 0.5).all()
        order = one["labels"][:count].argsort()
        assert torch.equal(one["labels"][:count][order], expected.labels)
        assert torch.allclose(one["boxes"][:count][order], expected.boxes, atol=4)
        assert one["masks"].shape[1:] == (1, 28, 28)
