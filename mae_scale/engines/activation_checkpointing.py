"""Activation checkpointing: keep the inputs of blocks only, and recompute the rest in the backward pass."""

import functools
from collections.abc import Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(blocks: Sequence[nn.Module], policy: str | int) -> None:
    """Wrap blocks in place: "none", "all", an int n (every n-th block), or "offload" (all, inputs in host memory).

    Names of parameters stay as they are, and so do the results. Apply after compilation.
    """
    if policy == "none":
        return
    if policy == "offload":
        from mae_scale.engines.fairscale import checkpoint_with_offload

        for block in blocks:
            checkpoint_with_offload(block)
        return
    every = 1 if policy == "all" else int(policy)
    for block in blocks[::every]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
