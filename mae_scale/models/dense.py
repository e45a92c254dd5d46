"""A plain ViT for detection and segmentation, and the feature pyramid on its last map.

Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (arXiv 2203.16527, ViTDet): most
blocks attend within windows, a few evenly placed ones to the whole image; attention has decomposed relative positions
(Li et al., MViTv2, arXiv 2112.01526, section 4.1), which begin at zero, so that the first forward is the plain
encoder's. BEiT's encoder (Bao et al., arXiv 2106.08254) keeps its own attention, biased by relative position, in the
same windows. Parameters have timm's names where timm has them.

Letters in shapes: B images, h x w patches of an image, D the width, H heads, d = D / H, N windows (or images).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.errors import UsageError
from mae_scale.models import beit
from mae_scale.models.drop_path import drop_path_rates, scaled
from mae_scale.models.vit import ViTSize, grid_of, init_weights, layer_norm, patchify, run_blocks, sincos_positions

ALIGNMENT = 8
"""Fused attention takes queries and keys whose width is a multiple of this."""


def evenly_placed(depth: int, count: int = 4) -> tuple[int, ...]:
    """Return the last block of each of `count` equal parts: 2, 5, 8 and 11 of 12. Raises UsageError if it cannot."""
    if count < 1 or depth % count:
        raise UsageError(
            f"{depth} blocks cannot be cut into {count} equal parts, each with one global block at its end"
        )
    part = depth // count
    return tuple(range(part - 1, depth, part))


def windows_of(x: Tensor, side: int) -> Tensor:
    """Return x [B, h, w, D] as windows [B * n, side, side, D], row by row; right and below it is filled with zeros."""
    batch, height, width, dim = x.shape
    x = functional.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    rows, columns = x.shape[1] // side, x.shape[2] // side
    x = x.reshape(batch, rows, side, columns, side, dim).transpose(2, 3)
    return x.reshape(batch * rows * columns, side, side, dim)


def image_of(windows: Tensor, height: int, width: int) -> Tensor:
    """Return windows [B * n, side, side, D] as [B, height, width, D]: the inverse of `windows_of`."""
    side, dim = windows.shape[1], windows.shape[3]
    rows, columns = -(-height // side), -(-width // side)
    x = windows.reshape(-1, rows, columns, side, side, dim).transpose(2, 3)
    return x.reshape(-1, rows * side, columns * side, dim)[:, :height, :width]


def places_by_distance(size: int, device: torch.device) -> Tensor:
    """Return where a table of 2 size - 1 distances holds that of each query's row (or column) from each key's, int64
    [size, size]."""
    place = torch.arange(size, device=device)
    return place[:, None] - place[None, :] + size - 1


def relative_embeddings(table: Tensor, size: int) -> Tensor:
    """Return the embeddings [size, size, d] of each query's row (or column) relative to each key's.

    table [2 n - 1, d], by query minus key; of another size it is resampled linearly.
    """
    if len(table) != 2 * size - 1:
        table = functional.interpolate(table.t().unsqueeze(0), size=2 * size - 1, mode="linear")[0].t()
    return table[places_by_distance(size, table.device)]


class RelativeAttention(nn.Module):
    """Self-attention over a map, whose scores have a part by the keys' relative row and one by their relative column.

    score(q, k) = scale q.k + q.rows[q's row - k's row] + q.columns[q's column - k's column]. Both parts are products
    of what depends on the query with what says where the key is, and so the widened queries [scale q, by rows, by
    columns] and keys [k, one-hot row, one-hot column] have just these scores: no bias [H, hw, hw] is held.
    """

    def __init__(self, width: int, heads: int, rows: int, columns: int):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * rows - 1, self.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * columns - 1, self.head_dim))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, h, w, D] -> [N, h, w, D]."""
        count, height, width, dim = x.shape
        qkv = self.qkv(x).reshape(count, height * width, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, H, hw, d]
        q, k = self._widened(q, k, height, width)
        attended = functional.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.proj(attended.transpose(1, 2).reshape(count, height, width, dim))

    def _widened(self, q: Tensor, k: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """q, k [N, H, hw, d] -> [N, H, hw, d + h + w], filled with zeros to a multiple of ALIGNMENT."""
        placed = q.unflatten(2, (height, width))  # [N, H, h, w, d]
        by_rows = torch.einsum("nhyxd,ykd->nhyxk", placed, relative_embeddings(self.rel_pos_h, height).to(q.dtype))
        by_columns = torch.einsum("nhyxd,xkd->nhyxk", placed, relative_embeddings(self.rel_pos_w, width).to(q.dtype))
        rows, columns = (torch.eye(n, dtype=k.dtype, device=k.device) for n in (height, width))
        where = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1).flatten(
            0, 1
        )  # [hw, h + w]
        q = torch.cat([self.scale * q, by_rows.flatten(2, 3), by_columns.flatten(2, 3)], dim=-1)
        k = torch.cat([k, where.expand(*k.shape[:2], -1, -1)], dim=-1)
        fill = (0, -q.shape[-1] % ALIGNMENT)
        return functional.pad(q, fill), functional.pad(k, fill)


class BiasedAttention(beit.BeitAttention):
    """BEiT's self-attention over a map: a table of this block has each head's bias of two patches' relative position.

    The table is that of a map of `rows` x `columns` patches; on other maps it is resampled, bilinearly.
    """

    def __init__(self, width: int, heads: int, rows: int, columns: int):
        grid = rows, columns
        super().__init__(width, heads, own_rows=math.prod(beit.distances(grid)))
        self.grid = grid

    # A map has its positions in its shape.
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x [N, h, w, D] -> [N, h, w, D]."""
        return super().forward(x.flatten(1, 2), self._bias(x.shape[1], x.shape[2])).view(x.shape)

    def bias(self, position: Tensor) -> Tensor:
        """Return the bias as it is."""
        return position

    def _bias(self, height: int, width: int) -> Tensor:
        """Return the bias [1, H, hw, hw] of a map."""
        own = self.relative_position_bias_table
        assert own is not None
        table = own.t().unflatten(1, beit.distances(self.grid)).unsqueeze(0)  # [1, H, 2 h - 1, 2 w - 1] of its own map
        if (height, width) != self.grid:
            table = functional.interpolate(table, size=beit.distances((height, width)), mode="bilinear")
        down, across = (places_by_distance(size, own.device) for size in (height, width))
        return table[:, :, down[:, None, :, None], across[None, :, None, :]].flatten(4).flatten(2, 3)


class DenseBlock(nn.Module):
    """Pre-norm block over a map; attention is within windows of `side` patches, or over the whole map (None).

    With `layer_scale` it is BEiT's block: biased attention, and branches with a learned scale that begins there.
    """

    def __init__(self, size: ViTSize, grid: tuple[int, int], side: int | None, layer_scale: float | None = None):
        super().__init__()
        self.side = side
        self.norm1, self.norm2 = layer_norm(size.width), layer_norm(size.width)
        attention = RelativeAttention if layer_scale is None else BiasedAttention
        self.attn = attention(size.width, size.heads, *(grid if side is None else (side, side)))
        self.mlp = Mlp(size.width, 4 * size.width)
        self.gamma_1, self.gamma_2 = (
            None if layer_scale is None else nn.Parameter(torch.full((size.width,), layer_scale)) for _ in range(2)
        )

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """x [B, h, w, D] -> the same; scales [B, 2] multiply the branches (stochastic depth)."""
        first, second = (None, None) if scales is None else scales[:, :, None, None, None].unbind(1)
        x = x + scaled(scaled(self._attend(self.norm1(x)), self.gamma_1), first)
        return x + scaled(scaled(self.mlp(self.norm2(x)), self.gamma_2), second)

    def _attend(self, x: Tensor) -> Tensor:
        if self.side is None:
            return self.attn(x)
        return image_of(self.attn(windows_of(x, self.side)), x.shape[1], x.shape[2])


class DenseEncoder(nn.Module):
    """ViT over the patches of a whole image, without cls token and final norm; it gives maps.

    Positions are learned for the grid of `pretraining_size` px and resampled to the image's (bicubic), so that images
    may have any sides that are multiples of the patch, also such that differ from image_size; tables of relative
    positions are of image_size (height, width) in global blocks. `drop_path` is the last block's rate of stochastic
    depth; forward() draws nothing, its caller gives the drops. With `layer_scale` it is BEiT's encoder: its positions
    are its attention's biases alone.
    """

    def __init__(
        self,
        size: ViTSize,
        *,
        image_size: tuple[int, int],
        pretraining_size: int,
        window: int,
        global_blocks: Sequence[int],
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.size = size
        self.drop_path_rates = drop_path_rates(drop_path, size.depth)
        height, width = (grid_of(side, size.patch_size) for side in image_size)
        self.pretraining_grid = grid_of(pretraining_size, size.patch_size)
        self.patch_embed = nn.Linear(size.patch_size**2 * 3, size.width)
        self.pos_embed: nn.Parameter | None = None
        if layer_scale is None:
            positions = sincos_positions(size.width, self.pretraining_grid)[1:]
            self.pos_embed = nn.Parameter(torch.tensor(positions))  # [L, D]
        self.blocks = nn.ModuleList(
            DenseBlock(size, (height, width), None if number in global_blocks else window, layer_scale)
            for number in range(size.depth)
        )
        if layer_scale is None:
            self.apply(init_weights)
        else:
            self.apply(beit.init_weights)
            beit.divide_last_layers(self.blocks)

    def forward(
        self, images: Tensor, branch_scales: Tensor | None = None, *, after: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Return maps [B, D, h, w] of images [B, 3, H, W]: after the last block, or after each of the blocks `after`.

        In training mode `branch_scales` [B, depth, 2] multiply the blocks' residual branches. Raises UsageError for
        images whose sides are no multiples of the patch.
        """
        height, width = (grid_of(side, self.size.patch_size) for side in images.shape[-2:])
        dtype = self.patch_embed.weight.dtype
        x = self.patch_embed(patchify(images.to(dtype), self.size.patch_size)).unflatten(1, (height, width))
        if self.pos_embed is not None:
            x = x + self._positions(self.pos_embed, height, width).to(dtype)
        ends = [self.size.depth - 1] if after is None else list(after)
        maps, begin = [], 0
        for end in ends:
            scales = None if branch_scales is None else branch_scales[:, begin : end + 1]
            x = run_blocks(self.blocks[begin : end + 1], x, branch_scales=scales)
            maps.append(x.permute(0, 3, 1, 2))
            begin = end + 1
        return maps

    def _positions(self, learned: Tensor, height: int, width: int) -> Tensor:
        """Return the positions [1, h, w, D] of those learned [L, D]."""
        grid = self.pretraining_grid
        positions = learned.unflatten(0, (grid, grid)).unsqueeze(0)
        if (height, width) == (grid, grid):
            return positions
        resampled = functional.interpolate(positions.permute(0, 3, 1, 2), size=(height, width), mode="bicubic")
        return resampled.permute(0, 2, 3, 1)


class DenseModel(nn.Module):
    """A model of whole images and `classes` of things in them: a dense encoder, and what comes after it."""

    encoder: DenseEncoder
    classes: int


class MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps [B, C, h, w]."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def rescalings(width: int, inner: int, outer: int, norm: Callable[[int], nn.Module]) -> nn.ModuleList:
    """Return what rescales maps [B, width, h, w] by 4, 2, 1 and 1/2: transposed convolutions and max-pooling.

    To `outer` channels by 4 (two convolutions, norm and GELU after the first), to `inner` by 2.
    """
    return nn.ModuleList(
        [
            nn.Sequential(
                nn.ConvTranspose2d(width, inner, 2, 2), norm(inner), nn.GELU(), nn.ConvTranspose2d(inner, outer, 2, 2)
            ),
            nn.ConvTranspose2d(width, inner, 2, 2),
            nn.Identity(),
            nn.MaxPool2d(2, 2),
        ]
    )


class FeaturePyramid(nn.Module):
    """The simple feature pyramid: maps at 4, 2, 1 and 1/2 times the resolution of one map, and 1/4 by sub-sampling.

    Section 3 and appendix A.2 of ViTDet: transposed convolutions of stride 2 (the first of two followed by LayerNorm
    and GELU) or max-pooling, then a 1 x 1 and a 3 x 3 convolution without bias, each with LayerNorm.
    """

    def __init__(self, width: int, channels: int = 256):
        super().__init__()
        self.scales = rescalings(width, width // 2, width // 4, MapNorm)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inner, channels, 1, bias=False),
                MapNorm(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                MapNorm(channels),
            )
            for inner in (width // 4, width // 2, width, width)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return maps [B, channels, s h, s w] for s = 4, 2, 1, 1/2, 1/4 of a map [B, width, h, w]."""
        maps = [head(scale(x)) for scale, head in zip(self.scales, self.heads, strict=True)]
        return [*maps, functional.max_pool2d(maps[-1], 1, 2)]
