"""Stochastic depth (drop path): the draws of the residual branches to drop per image, and the block that drops them.

Sources: Huang et al., "Deep Networks with Stochastic Depth" (arXiv 1603.09382), with the rates rising linearly over
the depth; timm's DropPath, which draws for each image and divides what is kept by the probability of keeping it.
timm draws from torch's generator; here the draws are an input of the block, so that they can depend on the image's
position in the global batch alone, and a block that is recomputed in the backward pass drops the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor

from data_pipeline.errors import UsageError
from data_pipeline.rng import generator

# Images that share a generator: making one takes as long as drawing for about as many.
_POSITIONS_PER_GENERATOR = 64


def drop_path_rates(drop_path: float, depth: int) -> list[float]:
    """Return each block's probability to drop a branch, from 0 to drop_path in equal steps (timm's rule).

    Raises UsageError unless drop_path is in [0, 1).
    """
    if not 0 <= drop_path < 1:
        raise UsageError(f"drop_path is {drop_path}; expected at least 0 and less than 1, such as 0.1")
    # Without a tensor, of which no number can be read in fake mode or on the meta device.
    return [drop_path * block / max(1, depth - 1) for block in range(depth)]


def draw_branch_scales(rates: Sequence[float], *, seed: int, step: int, positions: np.ndarray) -> Tensor:
    """Return factors of the residual branches, float32 [len(positions), len(rates), 2] on the host, attention then MLP.

    A branch of block k is dropped (0) with probability rates[k], otherwise multiplied by 1 / (1 - rates[k]), so that
    its expectation stays. A pure function of (seed, step, position): `positions` int [B] in the global batch.
    """
    groups, rows = np.divmod(np.asarray(positions), _POSITIONS_PER_GENERATOR)
    uniforms = np.empty((len(rows), len(rates), 2), dtype=np.float32)
    for group in np.unique(groups):
        draws = generator(seed, "drop_path", step, int(group))
        whole = draws.random((_POSITIONS_PER_GENERATOR, len(rates), 2), dtype=np.float32)
        uniforms[groups == group] = whole[rows[groups == group]]
    rate = np.asarray(rates, dtype=np.float64)[:, None]  # [depth, 1]
    return torch.from_numpy(np.where(uniforms < rate, 0, 1 / (1 - rate)).astype(np.float32))


def scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    """Return a residual branch times its scale; without one as it is.

    In the branch's own precision, as timm's: a float32 factor would make a bf16 residual stream float32.
    """
    return branch if scale is None else branch * scale.to(branch.dtype)


class DropPathBlock(Block):
    """timm's block, whose two residual branches are multiplied per image by given factors."""

    # timm's has attention masks in the place of scales.
    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return [B, N, D] of x [B, N, D]; scales [B, 2]: attention's and MLP's branch; without them as timm's."""
        if scales is None:
            return super().forward(x)
        x = x + scaled(self.ls1(self.attn(self.norm1(x))), scales[:, 0, None, None])
        return x + scaled(self.ls2(self.mlp(self.norm2(x))), scales[:, 1, None, None])
