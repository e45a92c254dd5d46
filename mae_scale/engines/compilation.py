"""torch.compile, block by block."""

from collections.abc import Iterable

import torch
from torch import nn


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each transformer block's forward in place; names of parameters stay as they are.

    Blocks of equal shape share one compilation, so a 32-block encoder compiles in the time of one.
    """
    blocks = list(blocks)
    # Blocks of one class share their code's limit, beyond which torch computes without compiling; the discrete VAE's
    # convolutions have almost as many shapes as blocks.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(blocks))
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
