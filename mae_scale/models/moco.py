"""MoCo v3 (Chen, Xie and He, arXiv 2104.02057): an encoder trained to tell each image's two views from all others.

Queries of one view are compared with keys of the other. Keys come from a moving average of the encoder and its
projector, the momentum encoder. The patch projection is random and stays as it is, which the paper found to be what
keeps the training of a ViT stable (section 4.2).

Letters in shapes: B images of a rank, N of all ranks, D the encoder's width, C the width of queries and keys.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.image_size import ImageSize
from mae_scale.models.global_batch_norm import TrainedGlobalBatchNorm, from_all_ranks
from mae_scale.models.vit import Encoder, ViTSize, check_images, patchify, resolve_size

if TYPE_CHECKING:
    from typing_extensions import Self


class FrozenProjection(nn.Module):
    """A linear layer that is not trained, float32 whatever the model's precision; stored with the model's buffers."""

    weight: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear):
        """linear: whose values it takes."""
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., p*p*3] -> [..., D], in x's dtype."""
        return functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the module; its values stay float32, so that a checkpoint holds them unrounded."""
        before = self.weight, self.bias
        super()._apply(fn, recurse)
        if self.weight.dtype != torch.float32:
            self.weight, self.bias = (old.to(self.weight.device) for old in before)
        return self


class SharedProjection(nn.Module):
    """The frozen projection of another encoder."""

    def __init__(self, of: FrozenProjection):
        super().__init__()
        self._of = (of,)  # in a tuple, so that it is not registered twice

    def forward(self, x: Tensor) -> Tensor:
        """x [..., p*p*3] -> [..., D], in x's dtype."""
        (of,) = self._of
        return functional.linear(x, of.weight.to(x.dtype), of.bias.to(x.dtype))


class _Linear(nn.Linear):
    """A linear layer that takes any precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def head(widths: list[int]) -> nn.Sequential:
    """Return linear layers without bias from each width to the next, each with a BatchNorm behind it.

    All but the last BatchNorm have affine terms and a ReLU. Numbers are those of the authors' release.
    """
    layers: list[nn.Module] = []
    for number, (inner, outer) in enumerate(pairwise(widths), start=1):
        is_last = number == len(widths) - 1
        layers += [_Linear(inner, outer, bias=False), TrainedGlobalBatchNorm(outer, affine=not is_last)]
        layers += [] if is_last else [nn.ReLU()]
    return nn.Sequential(*layers)


class ProjectedEncoder(nn.Module):
    """An encoder and its projector, of which the momentum encoder is an average."""

    def __init__(self, encoder: Encoder, projector: nn.Sequential):
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def features(self, *views: Tensor) -> Tensor:
        """Return the cls tokens [B, D] after the final norm of images [B, 3, H, W], those of several views in a row."""
        size, dtype = self.encoder.size, self.encoder.cls_token.dtype
        for images in views:
            check_images(images, self.encoder.image_size)
        # In the encoder's precision at once, to hold no copy in float32.
        patches = [patchify(images.to(dtype), size.patch_size) for images in views]
        return self.encoder(torch.cat(patches))[:, 0]

    def project(self, first: Tensor, second: Tensor) -> Tensor:
        """Return projections [2, B, C] float32 of two views [B, 3, H, W]; each view has its own batch statistics."""
        return self.projector(self.features(first, second).unflatten(0, (2, -1)))


class Moco(ProjectedEncoder):
    """The trained part: encoder, projector and predictor. Positions are fixed, the patch projection is frozen."""

    def __init__(self, size: ViTSize, *, image_size: ImageSize, hidden: int, dim: int):
        encoder = Encoder(size, image_size=image_size)
        _initialise(encoder)
        super().__init__(encoder, head([size.width, hidden, hidden, dim]))
        self.predictor = head([dim, hidden, dim])
        self.image_size = encoder.image_size

    def queries(self, first: Tensor, second: Tensor) -> Tensor:
        """Return queries [2, B, C] float32 of two views [B, 3, H, W]."""
        return self.predictor(self.project(first, second))

    def momentum_encoder(self) -> ProjectedEncoder:
        """Return a copy of encoder and projector that has no gradients, and shares the frozen projection."""
        projection = self.encoder.patch_embed
        assert isinstance(projection, FrozenProjection)
        averaged = copy.deepcopy(ProjectedEncoder(self.encoder, self.projector)).requires_grad_(False)
        averaged.encoder.patch_embed = SharedProjection(projection)
        return averaged


def build_moco(
    name: str | None = None,
    *,
    image_size: ImageSize = 224,
    patch_size: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    hidden: int = 4096,
    dim: int = 256,
) -> Moco:
    """Return the trained part of MoCo v3 with fresh weights (drawn from torch's generator).

    name: one of `mae_scale.models.vit.SIZES`; patch_size (px), width, depth and heads override it, or all are given.
    image_size: the images' side in pixels, or their (height, width); multiples of the patch size.
    hidden: width of the projector's and the predictor's hidden layers; dim: of queries and keys.
    Raises UsageError naming what does not fit.
    """
    size = resolve_size(name, patch_size=patch_size, width=width, depth=depth, heads=heads)
    return Moco(size, image_size=image_size, hidden=hidden, dim=dim)


def contrast(queries: Tensor, keys: Tensor, temperature: float, rank: int) -> Tensor:
    """Return the loss [] float32 of a rank's queries and keys [2, B, C] (the paper's algorithm 1).

    The cross-entropy of each query's cosine similarities, divided by the temperature, with the other view's keys of all
    ranks; the mean over the rank's images, the sum over the two directions, times 2 x temperature. Keys have no
    gradient. All ranks call it, with equal B.
    """
    queries = functional.normalize(queries.float(), dim=-1)
    keys = from_all_ranks(functional.normalize(keys.detach().float(), dim=-1))  # [ranks, 2, B, C]
    keys = keys.transpose(0, 1).flatten(1, 2).flip(0)  # [2, N, C], of the other view
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries @ keys.transpose(1, 2) / temperature  # [2, B, N]
    images = queries.shape[1]
    own = torch.arange(rank * images, (rank + 1) * images, device=logits.device)  # [B]
    both = functional.cross_entropy(logits.flatten(0, 1), own.repeat(2))  # the mean of the two directions
    return 2 * both * 2 * temperature


def _initialise(encoder: Encoder) -> None:
    """Initialise where the authors of MoCo v3 differ from those of MAE, and freeze the patch projection.

    Xavier-uniform weights of query, key and value each by itself, and a smaller cls token.
    """
    width = encoder.size.width
    bound = math.sqrt(6 / (width + width))
    for block in encoder.blocks:
        nn.init.uniform_(block.attn.qkv.weight, -bound, bound)  # type: ignore[union-attr, arg-type]  # timm's
    nn.init.normal_(encoder.cls_token, std=1e-6)
    encoder.patch_embed = FrozenProjection(encoder.patch_embed)  # type: ignore[assignment]  # as it is used
