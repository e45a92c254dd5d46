"""Anchors and pooled boxes lie where the maps' strides say, whatever the patch, and whatever was seen before."""

import copy

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.poolers import LevelMapper

from mae_scale.models.dense import DenseEncoder
from mae_scale.models.detector import ASPECT_RATIOS, LEVELS, Instances, MaskRcnn
from mae_scale.models.regions import Anchors, BoxPooler, strides_of
from mae_scale.models.vit import ViTSize


def maps_of(patch: int, grid: int) -> list[torch.Tensor]:
    """Maps of a pyramid over grid x grid patches, without values."""
    return [torch.zeros(1, 1, size, size) for size in (4 * grid, 2 * grid, grid, grid // 2, grid // 4)]


@pytest.mark.parametrize("patch", [16, 8])
def test_anchors_are_torchvisions_but_for_its_rounding(patch):
    maps, sides = maps_of(patch, 8), [2 * patch * 2**level for level in range(5)]
    images = ImageList(torch.zeros(1, 3, 8 * patch, 8 * patch), [(8 * patch, 8 * patch)])
    (ours,) = Anchors(strides_of(patch, 5), sides, ASPECT_RATIOS)(images, maps)
    (theirs,) = AnchorGenerator(tuple((side,) for side in sides), (ASPECT_RATIOS,) * 5)(images, maps)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 0.5 + 1e-4
    squares = slice(ASPECT_RATIOS.index(1.0), None, len(ASPECT_RATIOS))
    assert torch.equal(ours[squares], theirs[squares])


def test_anchors_of_patches_of_14_px_are_around_the_places_of_their_maps():
    """torchvision's have a stride of 3 in place of 3.5: at the end of a row they are 36 px aside."""
    maps = maps_of(14, 73)
    images = ImageList(torch.zeros(2, 3, 1022, 1022), [(1022, 1022)] * 2)
    anchors = Anchors(strides_of(14, 5), [28, 56, 112, 224, 448], ASPECT_RATIOS)
    found, again = anchors(images, maps)
    assert again is found
    other = anchors(images, [*maps[:-1], maps[-1][..., :-1]])[0]
    assert len(other) == len(found) - 3 * maps[-1].shape[-2]
    centres = (found[:, :2] + found[:, 2:]) / 2
    finest = centres[: 292 * 292 * 3 : 3].reshape(292, 292, 2)
    assert finest[0, -1].tolist() == pytest.approx([291 * 3.5, 0], abs=1e-3)
    assert centres[-1].tolist() == pytest.approx([17 * 56, 17 * 56])
    sides = found[:, 2:] - found[:, :2]
    assert sides.prod(dim=1)[:3].tolist() == pytest.approx([28 * 28] * 3, rel=1e-5)
    assert (sides[:3, 1] / sides[:3, 0]).tolist() == pytest.approx(list(ASPECT_RATIOS), rel=1e-5)


@pytest.mark.parametrize("patch", [16, 14, 8, 6])
def test_a_box_is_pooled_from_the_pixels_in_it_on_every_map(patch):
    """Maps of x (and y) coordinates: each pooled cell must be the middle of its part of the box, in pixels."""
    grid, cells = 80, 7
    strides = dict(zip(LEVELS[:-1], strides_of(patch, 4), strict=True))
    maps = {}
    for (name, stride), one in zip(strides.items(), maps_of(patch, grid), strict=False):
        place = stride * (torch.arange(one.shape[-1]) + 0.5)  # the middle of each cell
        maps[name] = torch.stack([place.expand(len(place), -1), place[:, None].expand(-1, len(place))])[None]
    pooler = BoxPooler(strides, cells, patch)
    sides = [patch * patches for patches in (1.5, 5.0, 11.0, 20.0)]
    boxes = torch.tensor([[9 * patch + 0.3, 7 * patch - 0.7, 9 * patch + 0.3 + s, 7 * patch - 0.7 + s] for s in sides])
    assert pooler.levels(boxes).tolist() == [0, 0, 1, 2]
    boxes = torch.cat([boxes, boxes * torch.tensor([1, 1, 2.5, 2.5])])
    assert 3 in pooler.levels(boxes).tolist()
    pooled = pooler(maps, [boxes], None)
    steps = (torch.arange(cells) + 0.5) / cells
    for box, one in zip(boxes, pooled, strict=True):
        x, y = (box[axis] + (box[axis + 2] - box[axis]) * steps for axis in (0, 1))
        assert torch.allclose(one[0], x.expand(cells, -1), atol=2e-2)
        assert torch.allclose(one[1], y[:, None].expand(-1, cells), atol=2e-2)


def test_the_map_for_a_box_is_torchvisions_for_patches_of_16_px():
    draws = torch.Generator().manual_seed(0)
    corner, sides = 100 * torch.rand(500, 2, generator=draws), 2 ** (10 * torch.rand(500, 2, generator=draws))
    boxes = torch.cat(
        [torch.cat([corner, corner + sides], dim=1), torch.tensor([[0.0, 0, 112, 112], [0, 0, 224, 224]])]
    )
    pooler = BoxPooler(dict(zip(LEVELS[:-1], strides_of(16, 4), strict=True)), 7, 16)
    assert torch.equal(pooler.levels(boxes), LevelMapper(2, 5)([boxes]))


def test_no_boxes_are_pooled_to_nothing():
    strides = dict(zip(LEVELS[:-1], strides_of(16, 4), strict=True))
    maps = dict(zip(strides, maps_of(16, 4), strict=False))
    assert BoxPooler(strides, 7, 16)(maps, [torch.zeros(0, 4)], None).shape == (0, 1, 7, 7)


def test_losses_do_not_depend_on_what_the_model_has_seen_before():
    """torchvision's pooler takes its scales from the first image: here it fills less than a third of the square."""
    torch.manual_seed(0)
    size = ViTSize(patch_size=8, width=32, depth=2, heads=2)
    encoder = DenseEncoder(size, image_size=(64, 64), pretraining_size=64, window=4, global_blocks=(1,))
    fresh = MaskRcnn(encoder, classes=3, channels=16).train()
    seen = copy.deepcopy(fresh)
    images, seeds = torch.randn(1, 3, 64, 64), torch.tensor([5])
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 4:18, 4:18] = 1
    one = [Instances(torch.tensor([[4.0, 4, 18, 18]]), torch.tensor([1]), mask)]
    seen.losses(images, [(20, 20)], one, seeds)
    expected, found = (model.losses(images, [(64, 64)], one, seeds) for model in (fresh, seen))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
