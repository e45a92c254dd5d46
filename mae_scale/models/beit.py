"""BEiT (Bao et al., arXiv 2106.08254): a ViT with mask tokens in place of removed patches, of which it predicts words.

What differs from the autoencoder's encoder: attention has a bias by relative position, and there are no absolute
positions; keys have no bias; each residual branch has a learned scale (LayerScale). Pre-training shares one table of
biases over all blocks, fine-tuning gives each block a copy of its own, as the authors do. Parameters have timm's names.

Letters in shapes: B images, L patches of an image, R the most that are removed, N = 1 + L tokens, D the width, H heads,
V words.
"""

from __future__ import annotations

import math

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.errors import UsageError
from data_pipeline.image_size import ImageSize, height_and_width, shortest_form
from mae_scale.models.drop_path import drop_path_rates, scaled
from mae_scale.models.masking import check_masking, kept_patches
from mae_scale.models.targets import WORDS, Target, Words, make_target
from mae_scale.models.vit import ViTSize, check_images, gather_tokens, grid_shape, layer_norm, patchify, run_blocks

INIT_STD = 0.02
TABLE = "relative_position_bias_table"
"""The name of the parameter that all blocks share."""
CLS_ROWS = 3
"""The last rows of a table: of the cls token to a patch, of a patch to it, and of it to itself."""


def relative_positions(grid: ImageSize) -> Tensor:
    """Return for each pair of tokens the row of the bias table, int64 [N, N]: by how far they lie apart.

    grid: rows h and columns w of patches, or the number along both sides of a square. Pairs of patches have
    (2 h - 1) (2 w - 1) rows; the last three are those of cls to patch, patch to cls, and cls to cls.
    """
    h, w = height_and_width(grid)
    places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)  # [2, L]
    down, across = places[:, :, None] - places[:, None, :]  # each [L, L]
    rows = torch.empty(1 + h * w, 1 + h * w, dtype=torch.int64)
    rows[1:, 1:] = (down + h - 1) * (2 * w - 1) + across + w - 1
    cls_to_patch = table_rows(grid) - CLS_ROWS
    rows[0, :], rows[:, 0], rows[0, 0] = cls_to_patch, cls_to_patch + 1, cls_to_patch + 2
    return rows


def table_rows(grid: ImageSize) -> int:
    """Return the number of rows of a bias table."""
    return math.prod(distances(grid)) + CLS_ROWS


def distances(grid: ImageSize) -> tuple[int, int]:
    """Return the numbers of different distances of two patches, down and across."""
    h, w = height_and_width(grid)
    return 2 * h - 1, 2 * w - 1


def _bias(table: Tensor, rows: Tensor) -> Tensor:
    """Return the bias [1, H, N, N] of a table [rows, H] and rows int64 [N, N]."""
    return table[rows].permute(2, 0, 1).unsqueeze(0)


class RelativePositionBias(nn.Module):
    """The attention's bias by relative position, shared by all blocks."""

    def __init__(self, grid: tuple[int, int], heads: int):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(table_rows(grid), heads))

    def forward(self, rows: Tensor) -> Tensor:
        """Return the bias [1, H, N, N] of rows int64 [N, N]."""
        return _bias(self.relative_position_bias_table, rows)


class _Projection(nn.Linear):
    """Queries, keys and values by one matrix; their bias is given, for keys have none."""

    def __init__(self, width: int):
        super().__init__(width, 3 * width, bias=False)

    # A module's forward, so that a sharding engine sees the use of the weight.
    def forward(self, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        """x [B, N, D], bias [3 D] -> [B, N, 3 D]."""
        return functional.linear(x, self.weight, bias)


class BeitAttention(nn.Module):
    """Self-attention with a bias on its scores; queries and values have a bias of their own, keys none."""

    relative_position_bias_table: nn.Parameter | None

    def __init__(self, width: int, heads: int, own_rows: int | None = None):
        """own_rows: rows of a bias table of its own; None where the table is shared."""
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.scale = self.head_dim**-0.5
        self.qkv = _Projection(width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        if own_rows is None:
            self.relative_position_bias_table = None
        else:
            self.relative_position_bias_table = nn.Parameter(torch.zeros(own_rows, heads))
        self.proj = nn.Linear(width, width)

    def bias(self, position: Tensor) -> Tensor:
        """Return the bias [1, H, N, N]: `position` itself, or of its own table for `position` int64 [N, N]."""
        own = self.relative_position_bias_table
        return position if own is None else _bias(own, position)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x [B, N, D] -> [B, N, D]; position: the shared bias [1, H, N, N], or rows int64 [N, N] of its own table."""
        batch, tokens, width = x.shape
        biases = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = self.qkv(x, biases)  # [B, N, 3 D]
        q, k, v = qkv.reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        bias = self.bias(position).to(q.dtype)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [B, H, N, D / H]
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


class BeitBlock(nn.Module):
    """Pre-norm block whose branches have a learned scale per channel."""

    def __init__(self, width: int, heads: int, layer_scale: float, own_rows: int | None = None):
        super().__init__()
        self.norm1, self.norm2 = layer_norm(width), layer_norm(width)
        self.attn = BeitAttention(width, heads, own_rows)
        self.mlp = Mlp(width, 4 * width)
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor, position: Tensor, scales: Tensor | None = None) -> Tensor:
        """x [B, N, D], position as in BeitAttention; scales [B, 2] multiply the branches (stochastic depth)."""
        first, second = (None, None) if scales is None else scales[:, :, None, None].unbind(1)
        x = x + scaled(self.gamma_1 * self.attn(self.norm1(x), position), first)
        return x + scaled(self.gamma_2 * self.mlp(self.norm2(x)), second)


class BeitEncoder(nn.Module):
    """BEiT's encoder: all patches, those removed as mask tokens; it is called as `mae_scale.models.vit.Encoder` is.

    `shared_bias`: one table of biases for all blocks, and a mask token (pre-training); else a table per block
    (fine-tuning). Without `final_norm` features leave the last block as they are. `drop_path` is the last block's rate
    of stochastic depth; forward() draws nothing, its caller gives the drops.
    """

    rows: Tensor

    def __init__(
        self,
        size: ViTSize,
        *,
        image_size: ImageSize,
        layer_scale: float,
        drop_path: float = 0.0,
        shared_bias: bool = True,
        final_norm: bool = True,
    ):
        super().__init__()
        if size.width % size.heads:
            raise UsageError(f"width {size.width} is not a multiple of heads {size.heads}")
        self.size, self.image_size = size, shortest_form(image_size)
        self.drop_path_rates = drop_path_rates(drop_path, size.depth)
        self.grid = grid_shape(image_size, size.patch_size)  # rows, columns
        self.patches = math.prod(self.grid)
        self.patch_embed = nn.Linear(3 * size.patch_size**2, size.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, size.width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, size.width)) if shared_bias else None
        self.rel_pos_bias = RelativePositionBias(self.grid, size.heads) if shared_bias else None
        self.register_buffer("rows", relative_positions(self.grid), persistent=False)  # [N, N]
        own_rows = None if shared_bias else table_rows(self.grid)
        self.blocks = nn.ModuleList(BeitBlock(size.width, size.heads, layer_scale, own_rows) for _ in range(size.depth))
        self.norm = layer_norm(size.width) if final_norm else nn.Identity()
        self.apply(init_weights)
        for token in (self.cls_token, self.mask_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
        divide_last_layers(self.blocks)

    def forward(self, patches: Tensor, mask: Tensor | None = None, branch_scales: Tensor | None = None) -> Tensor:
        """Return features [B, N, D] of patches [B, L, p*p*3], cls first, in the parameters' dtype.

        mask bool [B, L]: patches of which the mask token is seen. In training mode branch_scales [B, depth, 2] multiply
        the blocks' residual branches; without them, and in evaluation mode, nothing is dropped.
        Raises UsageError when branch_scales have another shape.
        """
        x = self.patch_embed(patches.to(self.cls_token.dtype))  # [B, L, D]
        if mask is not None and self.mask_token is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)  # [B, N, D]
        position = self.rows if self.rel_pos_bias is None else self.rel_pos_bias(self.rows)
        return self.norm(run_blocks(self.blocks, x, position, branch_scales=branch_scales))


def divide_last_layers(blocks: nn.ModuleList) -> None:
    """Divide the last layers of the branches of block n, from 1, by sqrt(2 n), as the authors do with fresh weights."""
    with torch.no_grad():
        for number, block in enumerate(blocks, start=1):
            for last in (block.attn.proj, block.mlp.fc2):  # type: ignore[union-attr]  # blocks of one kind
                last.weight.div_((2.0 * number) ** 0.5)  # type: ignore[operator, union-attr]


def init_weights(module: nn.Module) -> None:
    """Initialise a module as `Module.apply` visits it: linear weights from a normal of 0.02 cut at 1 std, no biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Beit(nn.Module):
    """BEiT in pre-training: the encoder, and a head that predicts the targets of removed patches.

    target: "tokens" (the words of a tokeniser with `words` of them), or a target of `mae_scale.models.targets`.
    mask_ratio and masking say which patches are removed, at most `removed` of an image; forward() is given the mask.
    """

    def __init__(
        self,
        size: ViTSize,
        *,
        image_size: ImageSize,
        layer_scale: float,
        mask_ratio: float = 0.38,
        masking: str = "block",
        target: str | Target = WORDS,
        words: int = 8192,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.masking, self.mask_ratio = masking, mask_ratio
        self.encoder = BeitEncoder(size, image_size=image_size, layer_scale=layer_scale, drop_path=drop_path)
        self.image_size, self.patch_size = self.encoder.image_size, size.patch_size
        self.grid, self.patches = self.encoder.grid, self.encoder.patches
        check_masking(masking, grid_size=self.grid, mask_ratio=mask_ratio)
        self.removed = self.patches - kept_patches(self.patches, mask_ratio)
        self.target = make_target(target, size.patch_size, words=words)
        self.head = nn.Linear(size.width, self.target.dim)
        init_weights(self.head)

    @property
    def predicts_words(self) -> bool:
        """Return whether the targets are words, which forward() is given, and not values of pixels."""
        return isinstance(self.target, Words)

    def features(self, images: Tensor, mask: Tensor | None = None, branch_scales: Tensor | None = None) -> Tensor:
        """Return normed features [B, N, D] of normalised images [B, 3, H, W]; mask, branch_scales as the encoder's."""
        check_images(images, self.image_size)
        return self.encoder(patchify(images, self.patch_size), mask, branch_scales)

    def forward(
        self, images: Tensor, mask: Tensor, words: Tensor | None = None, branch_scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss [B, R] fp32 and the prediction [B, R, V] of each image's removed patches, in image order.

        images [B, 3, H, W], normalised; mask bool [B, L], at most R = `removed` of an image; words int64 [B, L], where
        words are predicted; branch_scales [B, depth, 2]. Where fewer are removed, the last losses are 0.
        Only removed patches are predicted, and no shape depends on the mask: the host waits for nothing.
        """
        features = self.features(images, mask, branch_scales)[:, 1:]  # [B, L, D]
        first = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.removed]  # [B, R]
        prediction = self.head(gather_tokens(features, first))  # [B, R, V]
        if words is None:
            target = self.target.of_removed(patchify(images, self.patch_size), first)
        else:
            target = words.gather(1, first)
        return self.target.loss(prediction, target) * mask.gather(1, first), prediction
