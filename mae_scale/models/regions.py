"""Anchors on the maps of a pyramid, and the pooling of boxes from them, by the maps' own strides.

torchvision's AnchorGenerator and MultiScaleRoIAlign work the strides out from the sizes of images and maps: whole
numbers the one, powers of two the other, and that once, of the first image it sees, without what fills it up. Patches
of 14 px have strides of 3.5, and a jittered image may fill a third of the square: anchors and pooled features would
then lie elsewhere, without an error. Anchors and alignment are detectron2's: sides are not rounded, and a map's value
is at the middle of its cell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

OWN_MAP = 2
"""Place of the map with the patches' own resolution."""
OWN_BOX = 14
"""Side in patches from which on a box is pooled from that map; 224 px for patches of 16 (Lin et al., arXiv 1612.03144,
equation 1)."""
ROUNDING = 1e-6
"""So that a box of just such a side is not pooled from a finer map."""


def strides_of(patch_size: int, count: int) -> list[float]:
    """Return the strides of a pyramid's maps in pixels: a quarter of the patch, then each twice the one before."""
    return [patch_size * 2.0 ** (level - OWN_MAP) for level in range(count)]


class Anchors(nn.Module):
    """Boxes around each place of each map: of one side per map, in several aspect ratios (height by width)."""

    def __init__(self, strides: Sequence[float], sides: Sequence[float], ratios: Sequence[float]):
        super().__init__()
        self.strides, self.sides, self.ratios = tuple(strides), tuple(sides), tuple(ratios)
        self._last: tuple[object, Tensor] | None = None

    def num_anchors_per_location(self) -> list[int]:
        """Return how many there are at a place, of each map."""
        return [len(self.ratios)] * len(self.sides)

    def forward(self, images: ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors [n, 4] (x0, y0, x1, y1) in pixels, float32, for each image; maps [B, C, h, w]."""
        key = (maps[0].device, *(one.shape[-2:] for one in maps))
        if self._last is None or self._last[0] != key:
            levels = zip(maps, self.strides, self.sides, strict=True)
            self._last = key, torch.cat([self._of_map(one, stride, side) for one, stride, side in levels])
        return [self._last[1]] * len(images.image_sizes)

    def _of_map(self, one: Tensor, stride: float, side: float) -> Tensor:
        """Return [h w ratios, 4], row by row."""
        height, width = one.shape[-2:]
        shapes = [(side / math.sqrt(ratio) / 2, side * math.sqrt(ratio) / 2) for ratio in self.ratios]  # half w, h
        around = torch.tensor([(-x, -y, x, y) for x, y in shapes], device=one.device)  # [ratios, 4]
        y, x = (stride * torch.arange(length, device=one.device) for length in (height, width))
        y, x = torch.meshgrid(y, x, indexing="ij")
        return (torch.stack([x, y, x, y], dim=-1)[:, :, None] + around).reshape(-1, 4)


class BoxPooler(nn.Module):
    """Pools boxes, each from the map that fits its size, to a grid of `cells` x `cells`.

    RoIAlign (He et al., arXiv 1703.06870) as detectron2 aligns it, with a sample for every cell of the map.
    """

    def __init__(self, strides: Mapping[str, float], cells: int, patch_size: int):
        super().__init__()
        self.strides, self.cells, self.own_box = dict(strides), cells, OWN_BOX * patch_size

    def levels(self, boxes: Tensor) -> Tensor:
        """Return the place of the map for each of boxes [n, 4], int64 [n]."""
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = torch.floor(OWN_MAP + torch.log2(sides / self.own_box) + ROUNDING)
        return level.clamp(0, len(self.strides) - 1).long()

    def forward(self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor], _: object) -> Tensor:
        """Return [n, C, cells, cells] of boxes [n_i, 4] in pixels of each image; maps [B, C, h, w] by name."""
        image = torch.cat([torch.full_like(one[:, :1], number) for number, one in enumerate(boxes)])  # [n, 1]
        rois = torch.cat([image, torch.cat(list(boxes))], dim=1)  # [n, 5]
        levels = self.levels(rois[:, 1:])
        first = next(iter(maps.values()))
        pooled = first.new_zeros(len(rois), first.shape[1], self.cells, self.cells)
        for level, (name, stride) in enumerate(self.strides.items()):
            rows = torch.where(levels == level)[0]
            found = roi_align(
                maps[name], rois[rows], self.cells, spatial_scale=1 / stride, sampling_ratio=0, aligned=True
            )
            pooled = pooled.index_put((rows,), found.to(pooled.dtype))
        return pooled
