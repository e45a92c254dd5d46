"""The GPU memory of a training step from formulas, in bf16 under ZeRO 1 or 2.

Not counted are the CUDA context, NCCL, the decoder of images and what the allocator leaves unused: allow 10 to 15 GiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_BUCKETS = 2 * 2 * 200_000_000
"""Two buckets of 200 million bf16 gradients (ds_configs, reduce_bucket_size)."""
_IMAGES = 3
"""Images, their patches and the targets of removed ones, in images of float32 (measured: 1.7 to 2.2)."""


@dataclass(frozen=True)
class Stack:
    """Transformer blocks, of which the last `trained` are trained, with `tokens` of width `width` per image."""

    tokens: int
    width: int
    heads: int
    depth: int
    trained: float

    def kept_bytes(self, checkpointed: bool) -> float:
        """Return the bytes per image that the forward pass keeps for the backward pass; fused attention, bf16."""
        # Per token and block: 16 values per channel (inputs and outputs of two norms, queries, keys, values,
        # attention's output and its projection, the MLP's 4 + 4); two norms' deviations and means; a sum per head.
        block = self.tokens * (32 * self.width + 8 + 4 * self.heads)
        if not self.trained:
            return block  # the one that is being run
        if checkpointed:
            return self.trained * self.tokens * 2 * self.width + block
        return self.trained * block


def state_bytes(parameters: int, trained: int, *, ranks: int, zero_stage: int, ema: bool = False) -> float:
    """Return the bytes of weights, gradients and AdamW's state on a rank.

    ZeRO 1 (DeepSpeed's bf16 optimiser): weights and gradients in bf16, all gradients in float32 too, master weights
    and two moments sharded. ZeRO 2: gradients in float32 are sharded as well, behind two buckets. ema: one more shard.
    """
    shared = (12 + 4 * ema) * trained / ranks
    if zero_stage == 1:
        return 2 * parameters + 6 * trained + shared
    return 2 * parameters + shared + 4 * trained / ranks + _BUCKETS


def activation_bytes(
    stacks: Sequence[Stack], *, micro_batch: int, image_size: int, checkpointed: bool = False
) -> float:
    """Return the bytes of a micro-batch between its forward and its backward pass."""
    image = _IMAGES * 3 * image_size**2 * 4
    return micro_batch * (image + sum(stack.kept_bytes(checkpointed) for stack in stacks))
