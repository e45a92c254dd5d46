"""The Vision Transformer encoder, and the parts that it shares with the decoder: patches, positions, blocks.

Sources: Dosovitskiy et al., arXiv 2010.11929 (ViT); He et al., arXiv 2111.06377 (masked autoencoder).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from data_pipeline.errors import UsageError
from data_pipeline.image_size import ImageSize, height_and_width, shortest_form
from mae_scale.models.drop_path import DropPathBlock, drop_path_rates

layer_norm = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class ViTSize:
    """Patch side in pixels, width of a token, number of blocks, attention heads per block."""

    patch_size: int
    width: int
    depth: int
    heads: int


SIZES = {
    "vit_base_patch16": ViTSize(patch_size=16, width=768, depth=12, heads=12),
    "vit_large_patch16": ViTSize(patch_size=16, width=1024, depth=24, heads=16),
    "vit_huge_patch14": ViTSize(patch_size=14, width=1280, depth=32, heads=16),
}


def resolve_size(
    name: str | None,
    *,
    patch_size: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
) -> ViTSize:
    """Return the size called `name` with the given values in place of its own; without a name give all four.

    Raises UsageError for an unknown name, or naming the sizes that are missing.
    """
    sizes = {"patch_size": patch_size, "width": width, "depth": depth, "heads": heads}
    given = {key: value for key, value in sizes.items() if value is not None}
    if name is None:
        missing = [key for key in sizes if key not in given]
        if missing:
            raise UsageError(
                f"a model without a name needs {', '.join(missing)}: give them, or one of the names {', '.join(SIZES)}"
            )
        return ViTSize(**given)
    if name not in SIZES:
        raise UsageError(f"unknown model name {name!r}: expected one of {', '.join(SIZES)}, or no name and sizes")
    return replace(SIZES[name], **given)


def grid_of(image_size: int, patch_size: int) -> int:
    """Return the number of patches along a side of an image. Raises UsageError when the patch does not divide it."""
    if patch_size < 1 or image_size < patch_size or image_size % patch_size:
        raise UsageError(
            f"image_size {image_size} px is not a multiple of patch_size {patch_size} px: "
            f"the nearest that fits is {max(1, round(image_size / max(patch_size, 1))) * patch_size}"
        )
    return image_size // patch_size


def grid_shape(image_size: ImageSize, patch_size: int) -> tuple[int, int]:
    """Return the rows and columns of patches of an image. Raises UsageError when the patch does not divide a side."""
    height, width = height_and_width(image_size)
    return grid_of(height, patch_size), grid_of(width, patch_size)


def check_images(images: Tensor, image_size: ImageSize) -> None:
    """Raise UsageError unless images are [B, 3, H, W] of that size."""
    height, width = height_and_width(image_size)
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, height, width):
        raise UsageError(
            f"images have shape {tuple(images.shape)}, this model takes [B, 3, {height}, {width}]: "
            "resize them, or build the model with their image_size"
        )


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Return images [B, 3, H, W] as patches [B, L, p*p*3], row by row; a patch in the order (row, column, channel)."""
    batch, channels, height, width = images.shape
    h, w, p = height // patch_size, width // patch_size, patch_size
    x = images.reshape(batch, channels, h, p, w, p).permute(0, 2, 4, 3, 5, 1)  # [B, h, w, p, p, 3]
    return x.reshape(batch, h * w, p * p * channels)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int] | None = None) -> Tensor:
    """Return patches [B, L, p*p*C] of images as images [B, C, H, W]; the inverse of `patchify`.

    grid: rows and columns of patches; None: of square images. Raises UsageError when the patches are of another number.
    """
    batch, length, dim = patches.shape
    p, square = patch_size, round(length**0.5)
    rows, columns = grid or (square, square)
    if rows * columns != length or dim % (p * p):
        shape = f"an image of {rows} x {columns} patches" if grid else "a square image"
        raise UsageError(f"patches {tuple(patches.shape)} are not {shape} of {p} px patches")
    x = patches.reshape(batch, rows, columns, p, p, dim // (p * p)).permute(0, 5, 1, 3, 2, 4)  # [B, C, h, p, w, p]
    return x.reshape(batch, -1, rows * p, columns * p)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Return the tokens [B, K, C] of [B, L, C] at each image's index, int64 [B, K]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def sincos_positions(width: int, grid: ImageSize) -> np.ndarray:
    """Return fixed 2-D sine-cosine positions, float32 [1 + L, width], of L patches; the first row (cls) is zero.

    grid: rows and columns of patches, or the number along both sides of a square; positions are row by row. The first
    half of the width encodes the column, the second half the row, each as sines then cosines of
    position / 10000^(i / (width / 4)). That order is the authors' release's (column first).
    """
    if width % 4:
        raise UsageError(f"width {width} is not a multiple of 4, which sine-cosine positions need")
    frequency = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))  # [D / 4]
    rows, columns = height_and_width(grid)
    angle = np.arange(max(rows, columns))[:, None] * frequency  # [max(h, w), D / 4]
    line = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)  # [max(h, w), D / 2]
    column = np.tile(line[:columns], (rows, 1))  # [L, D / 2]
    row = np.repeat(line[:rows], columns, axis=0)  # [L, D / 2]
    patches = np.concatenate([column, row], axis=1)  # [L, D]
    return np.concatenate([np.zeros((1, width)), patches]).astype(np.float32)


def make_blocks(width: int, depth: int, heads: int, block: type[Block] = Block) -> nn.ModuleList:
    """Return `depth` pre-norm transformer blocks (timm's), MLP ratio 4, qkv bias, GELU, fused attention."""
    if width % heads:
        raise UsageError(f"width {width} is not a multiple of heads {heads}")
    norm = cast(type[nn.Module], layer_norm)  # as timm itself passes one, against its annotation
    return nn.ModuleList(block(width, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth))


def init_weights(module: nn.Module) -> None:
    """Initialise a module as `Module.apply` visits it: Xavier-uniform linear weights, zero biases, unit norms."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def parameter_count(model: nn.Module, *, positions: bool = False) -> int:
    """Return the number of parameters; with `positions` also of the fixed positions, which published counts include."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if positions:
        count += sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith("pos_embed"))
    return count


def run_blocks(blocks: nn.ModuleList, x: Tensor, *shared: Tensor, branch_scales: Tensor | None) -> Tensor:
    """Return tokens [B, N, D] after all blocks; `shared` goes to each, and in training its branch_scales [B, 2].

    Raises UsageError when branch_scales are not [B, depth, 2].
    """
    if branch_scales is not None and tuple(branch_scales.shape) != (len(x), len(blocks), 2):
        raise UsageError(
            f"branch_scales have shape {tuple(branch_scales.shape)}, "
            f"expected [{len(x)}, {len(blocks)}, 2]: one number per residual branch"
        )
    if branch_scales is None or not blocks.training:
        for block in blocks:
            x = block(x, *shared)
    else:
        # Contiguous [B, 2] for each block: a compiled block would copy parts that are not aligned.
        for block, scales in zip(blocks, branch_scales.transpose(0, 1).contiguous(), strict=True):
            x = block(x, *shared, scales)
    return x


class Encoder(nn.Module):
    """ViT over the visible patches: cls token, fixed positions, pre-norm blocks, final norm.

    The patch projection is a linear layer over a patch's p*p*3 numbers, so that visible patches alone can be
    embedded. Positions are computed, not learned and not stored: they follow from width and grid; with
    `learned_positions`, for fine-tuning, they are a parameter with these initial values.
    Without `final_norm` features leave the last block as they are. With `mask_tokens` removed patches enter as a
    learned token instead of not at all (the slow ablation).
    `drop_path` is the last block's rate of stochastic depth; forward() draws nothing, its caller gives the drops.
    """

    pos_embed: Tensor

    def __init__(
        self,
        size: ViTSize,
        *,
        image_size: ImageSize,
        mask_tokens: bool = False,
        drop_path: float = 0.0,
        learned_positions: bool = False,
        final_norm: bool = True,
    ):
        super().__init__()
        self.size, self.image_size = size, shortest_form(image_size)
        self.drop_path_rates = drop_path_rates(drop_path, size.depth)
        self.grid = grid_shape(image_size, size.patch_size)  # rows, columns
        self.patches = math.prod(self.grid)
        self.patch_embed = nn.Linear(size.patch_size**2 * 3, size.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, size.width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, size.width)) if mask_tokens else None
        positions = torch.tensor(sincos_positions(size.width, self.grid))  # [1 + L, D]
        if learned_positions:
            self.pos_embed = nn.Parameter(positions)
        else:
            self.register_buffer("pos_embed", positions, persistent=False)
        self.blocks = make_blocks(size.width, size.depth, size.heads, DropPathBlock)
        self.norm = layer_norm(size.width) if final_norm else nn.Identity()

        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        patches: Tensor,
        visible: Tensor | None = None,
        removed: Tensor | None = None,
        branch_scales: Tensor | None = None,
    ) -> Tensor:
        """Return features [B, 1 + L, D] of patches [B, L, p*p*3], cls first, in the parameters' dtype.

        With `visible` int64 [B, K] only these patches are read, projected and encoded: [B, 1 + K, D].
        An encoder with mask tokens also takes `removed` [B, R]: its output is [B, 1 + K + R, D].
        In training mode `branch_scales` [B, depth, 2] (`draw_branch_scales` of `drop_path_rates`) multiply the
        blocks' residual branches; without them, and in evaluation mode, nothing is dropped.
        Raises UsageError when branch_scales have another shape.
        """
        dtype = self.cls_token.dtype
        cls_position, positions = self.pos_embed.to(dtype).split([1, self.patches])  # [1, D], [L, D]
        if visible is not None:
            patches = gather_tokens(patches, visible)  # [B, K, p*p*3]
            positions = positions[visible]  # [B, K, D]
        x = self.patch_embed(patches.to(dtype)) + positions  # [B, K, D]
        if removed is not None and self.mask_token is not None:
            masked = self.mask_token + self.pos_embed[1:].to(dtype)[removed]  # [B, R, D]
            x = torch.cat([x, masked], dim=1)  # [B, K + R, D]
        cls = (self.cls_token + cls_position).expand(x.shape[0], -1, -1)  # [B, 1, D]
        x = torch.cat([cls, x], dim=1)  # [B, 1 + K, D]
        return self.norm(run_blocks(self.blocks, x, branch_scales=branch_scales))
