"""BEiT (Bao et al., arXiv 2106.08254): a ViT with mask tokens in place of removed patches, whose words it predicts.

What differs from the autoencoder's encoder: attention has a bias by relative position, shared by all blocks, and there
are no absolute positions; keys have no bias; each residual branch has a learned scale (LayerScale). Blocks have timm's
names.

Letters in shapes: B images, L patches of an image, N = 1 + L tokens, D the width, H heads, V words.
"""

from __future__ import annotations

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.errors import UsageError
from mae_scale.models.vit import ViTSize, grid_of, layer_norm, patchify

INIT_STD = 0.02


def relative_positions(grid: int) -> Tensor:
    """Return for each pair of tokens the row of the bias table, int64 [N, N]: by how far they lie apart.

    Patches have (2 grid - 1)^2 rows; the last three are those of cls to patch, patch to cls, and cls to cls.
    """
    side = 2 * grid - 1
    places = torch.stack(torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")).flatten(1)  # [2, L]
    apart = places[:, :, None] - places[:, None, :] + grid - 1  # [2, L, L], from 0
    rows = torch.empty(1 + grid**2, 1 + grid**2, dtype=torch.int64)
    rows[1:, 1:] = apart[0] * side + apart[1]
    rows[0, :], rows[:, 0], rows[0, 0] = side**2, side**2 + 1, side**2 + 2
    return rows


class RelativePositionBias(nn.Module):
    """The attention's bias by relative position, shared by all blocks."""

    rows: Tensor

    def __init__(self, grid: int, heads: int):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))
        self.register_buffer("rows", relative_positions(grid), persistent=False)  # [N, N]

    def forward(self) -> Tensor:
        """Return the bias [1, H, N, N]."""
        return self.relative_position_bias_table[self.rows].permute(2, 0, 1).unsqueeze(0)


class BeitAttention(nn.Module):
    """Self-attention with a bias on its scores; queries and values have a bias of their own, keys none."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, N, D], bias [1, H, N, N] -> [B, N, D]."""
        batch, tokens, width = x.shape
        biases = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = functional.linear(x, self.qkv.weight, biases)  # [B, N, 3 D]
        q, k, v = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))  # [B, H, N, D / H]
        return self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))


class BeitBlock(nn.Module):
    """Pre-norm block whose branches have a learned scale per channel."""

    def __init__(self, width: int, heads: int, layer_scale: float):
        super().__init__()
        self.norm1, self.norm2 = layer_norm(width), layer_norm(width)
        self.attn = BeitAttention(width, heads)
        self.mlp = Mlp(width, 4 * width)
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor, bias: Tensor, scales: Tensor | None = None) -> Tensor:
        """x [B, N, D], bias [1, H, N, N]; scales [B, 2] multiply the branches (stochastic depth)."""
        first, second = (None, None) if scales is None else scales.to(x.dtype)[:, :, None, None].unbind(1)
        x = x + _scaled(self.gamma_1 * self.attn(self.norm1(x), bias), first)
        return x + _scaled(self.gamma_2 * self.mlp(self.norm2(x)), second)


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    return branch if scale is None else branch * scale


class Beit(nn.Module):
    """BEiT with a head for the words of removed patches."""

    def __init__(self, size: ViTSize, *, image_size: int, words: int, layer_scale: float):
        super().__init__()
        if size.width % size.heads:
            raise UsageError(f"width {size.width} is not a multiple of heads {size.heads}")
        self.size, self.image_size, self.words = size, image_size, words
        self.grid = grid_of(image_size, size.patch_size)
        self.patches = self.grid**2
        self.patch_embed = nn.Linear(3 * size.patch_size**2, size.width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, size.width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, size.width))
        self.rel_pos_bias = RelativePositionBias(self.grid, size.heads)
        self.blocks = nn.ModuleList(BeitBlock(size.width, size.heads, layer_scale) for _ in range(size.depth))
        self.norm = layer_norm(size.width)
        self.head = nn.Linear(size.width, words)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as the authors: truncated normals; block n's last layers are divided by sqrt(2 n)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.mask_token):
            nn.init.trunc_normal_(token, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, start=1):
                assert isinstance(block, BeitBlock)
                block.attn.proj.weight.div_((2.0 * number) ** 0.5)
                block.mlp.fc2.weight.div_((2.0 * number) ** 0.5)

    def features(self, images: Tensor, mask: Tensor | None = None, branch_scales: Tensor | None = None) -> Tensor:
        """Return normed features [B, N, D] of normalised images [B, 3, S, S], cls first.

        mask bool [B, L]: patches of which the mask token is seen. branch_scales [B, depth, 2]: stochastic depth.
        """
        side, dtype = self.image_size, self.cls_token.dtype
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise UsageError(f"images have shape {tuple(images.shape)}, this model takes [B, 3, {side}, {side}]")
        x = self.patch_embed(patchify(images, self.size.patch_size).to(dtype))  # [B, L, D]
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # [B, N, D]
        bias = self.rel_pos_bias()
        for number, block in enumerate(self.blocks):
            x = block(x, bias, None if branch_scales is None else branch_scales[:, number])
        return self.norm(x)

    def forward(
        self, images: Tensor, mask: Tensor, tokens: Tensor, branch_scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss [M] fp32 and the logits [M, V] of the M masked patches of all images, in the mask's order.

        images [B, 3, S, S], normalised; mask bool [B, L]; tokens int64 [B, L], the patches' words.
        """
        masked = self.features(images, mask, branch_scales)[:, 1:][mask]  # [M, D]
        logits = self.head(masked)  # [M, V]
        return functional.cross_entropy(logits.float(), tokens[mask], reduction="none"), logits
