"""The work and the state of a training recipe in numbers: what memory and time are computed from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from data_pipeline.image_size import ImageSize, height_and_width


@dataclass(frozen=True)
class Stack:
    """Transformer blocks, of which the last `trained` are trained, with `tokens` of width `width` per image."""

    tokens: int
    width: int
    heads: int
    depth: int
    trained: float
    scaled: bool = False
    """True: each branch is multiplied by a learned scale (LayerScale)."""
    sequences: int = 1
    """Number of equal parts of the tokens, such as views of the image, that attend within themselves."""

    @property
    def products(self) -> list[tuple[int, int, int]]:
        """(rows per image, inner, outer) of a block's four linear layers."""
        n, d = self.tokens, self.width
        return [(n, d, 3 * d), (n, d, d), (n, d, 4 * d), (n, 4 * d, d)]

    @property
    def parameters(self) -> int:
        """Parameters of a block: its linear layers with biases, and two norms."""
        return 12 * self.width**2 + 13 * self.width

    @property
    def attention_flops(self) -> int:
        """FLOPs per image and block, forward, of the two products of queries, keys and values."""
        return 4 * self.tokens**2 * self.width // self.sequences


@dataclass(frozen=True)
class LossBytes:
    """Bytes per predicted value that a loss takes, in a step in bf16."""

    kept: int
    """From the prediction to its backward pass."""
    temporary: int
    """Beside it, in the loss itself."""


SQUARED_ERROR = LossBytes(kept=10, temporary=16)
"""Keeps the prediction in two precisions, and the target."""
CROSS_ENTROPY = LossBytes(kept=4, temporary=8)
"""Keeps the logarithms of the probabilities; then computes their gradient, and that of the logits."""


@dataclass(frozen=True)
class Workload:
    """A task's model: its blocks, its other matrix products, and how many numbers it holds."""

    image_size: ImageSize
    stacks: tuple[Stack, ...]
    other_products: tuple[tuple[int, int, int, bool], ...]
    """(rows per image, inner, outer, trained) of the linear layers outside of the blocks."""
    predicted: int
    """Values per image that the loss is computed of."""
    groups: tuple[int, ...]
    """Trained parameters in each of the optimiser's groups."""
    frozen: int
    """Parameters that are not trained."""
    parameters: tuple[int, ...]
    """Size of each trained parameter, in elements."""
    buffer_bytes: int
    ema: bool = False
    """True: an average of the weights is kept."""
    followers: tuple[int, ...] = ()
    """Size of each parameter of a momentum encoder, an average of trained ones, in elements; they are in `frozen`."""
    loss: LossBytes = SQUARED_ERROR
    kept_values: int = 0
    """Values per image, in the step's precision, kept for the backward pass outside of blocks."""
    kept_bytes: int = 0
    """Bytes per image that are kept there in other precisions."""

    @property
    def image_bytes(self) -> int:
        """Bytes of an image in float32."""
        return 3 * math.prod(height_and_width(self.image_size)) * 4

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(self.groups)

    @property
    def forward_flops(self) -> int:
        """FLOPs per image of all matrix products, forward."""
        flops = sum(2 * m * k * n for m, k, n, _ in self.other_products)
        for stack in self.stacks:
            flops += stack.depth * (sum(2 * m * k * n for m, k, n in stack.products) + stack.attention_flops)
        return flops

    @property
    def backward_flops(self) -> int:
        """FLOPs per image of all matrix products, backward: twice those of what is trained."""
        flops = sum(2 * 2 * m * k * n for m, k, n, trained in self.other_products if trained)
        for stack in self.stacks:
            block = sum(2 * m * k * n for m, k, n in stack.products) + stack.attention_flops
            flops += round(2 * stack.trained * block)
        return flops
