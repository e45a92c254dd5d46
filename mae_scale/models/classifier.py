"""The classifier on a pre-trained encoder: full and partial fine-tuning, linear probing (He et al., section 4).

Letters in shapes: B images, L patches of an image, D the encoder's width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from data_pipeline.errors import UsageError
from data_pipeline.image_size import ImageSize
from mae_scale.models.beit import BeitEncoder
from mae_scale.models.vit import Encoder, ViTSize, check_images, layer_norm, patchify, resolve_size

if TYPE_CHECKING:
    from typing_extensions import Self


class Classifier(nn.Module):
    """Encoder over all patches, one pooled feature, a linear head. See `build_classifier`."""

    def __init__(
        self,
        size: ViTSize,
        *,
        image_size: ImageSize,
        classes: int,
        pool: str,
        batch_norm: bool,
        trained_blocks: float | None,
        drop_path: float,
        layer_scale: float | None,
    ):
        super().__init__()
        self.patch_size, self.classes, self.pool = size.patch_size, classes, pool
        self.trained_blocks = trained_blocks
        mean = pool == "mean"
        self.encoder: Encoder | BeitEncoder
        if layer_scale is None:
            self.encoder = Encoder(
                size, image_size=image_size, drop_path=drop_path, learned_positions=True, final_norm=not mean
            )
        else:
            self.encoder = BeitEncoder(
                size,
                image_size=image_size,
                layer_scale=layer_scale,
                drop_path=drop_path,
                shared_bias=False,
                final_norm=not mean,
            )
        self.image_size = self.encoder.image_size
        # Mean-pooled features are normed after pooling, by a norm that starts fresh, as in the authors' release.
        self.fc_norm = layer_norm(size.width) if mean else nn.Identity()
        self.batch_norm = GlobalBatchNorm(size.width) if batch_norm else nn.Identity()
        self.head = nn.Linear(size.width, classes)
        # As in the authors' release: nearly zero for fine-tuning, so that the first gradients keep the encoder.
        nn.init.trunc_normal_(self.head.weight, std=0.01 if trained_blocks == 0 else 2e-5)
        nn.init.zeros_(self.head.bias)
        trained = set(self._trained_modules())
        if trained_blocks is not None:
            for module in self.modules():
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad = module in trained

    def features(self, images: Tensor, branch_scales: Tensor | None = None) -> Tensor:
        """Return pooled features [B, D] of images [B, 3, H, W], normalised by ImageNet's mean and std."""
        check_images(images, self.image_size)
        tokens = self.encoder(patchify(images, self.patch_size), branch_scales=branch_scales)  # [B, 1 + L, D]
        pooled = tokens[:, 1:].mean(dim=1) if self.pool == "mean" else tokens[:, 0]  # [B, D]
        return self.fc_norm(pooled)

    def forward(self, images: Tensor, branch_scales: Tensor | None = None) -> Tensor:
        """Return logits [B, C], in the parameters' dtype, of images [B, 3, H, W]; branch_scales as in Encoder."""
        features = self.batch_norm(self.features(images, branch_scales))
        return self.head(features.to(self.head.weight.dtype))

    @property
    def frozen_blocks(self) -> int:
        """Number of leading frozen blocks."""
        depth = len(self.encoder.blocks)
        return 0 if self.trained_blocks is None else depth - int(-(-self.trained_blocks // 1))

    def train(self, mode: bool = True) -> Classifier:
        """Set the mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.trained_blocks == 0:
            self.encoder.eval()
        return self

    def layer_of(self, name: str) -> int:
        """Return a parameter's layer for layer-wise lr decay: 0 embedding, i + 1 block i, depth + 1 the rest."""
        if name.startswith("encoder.blocks."):
            return int(name.split(".")[2]) + 1
        embedding = ("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed.")
        return 0 if name.startswith(embedding) else len(self.encoder.blocks) + 1

    def _trained_modules(self) -> Iterator[nn.Module]:
        """Yield what partial fine-tuning trains: the last blocks, the norm after them, the head; 0: the head alone."""
        yield from self.head.modules()
        if self.trained_blocks:
            for norm in (self.encoder.norm, self.fc_norm):
                yield from norm.modules()
            whole = int(self.trained_blocks)
            for block in self.encoder.blocks[len(self.encoder.blocks) - whole :]:
                yield from block.modules()
            if self.trained_blocks != whole:
                block = cast(Block, self.encoder.blocks[len(self.encoder.blocks) - whole - 1])
                for part in (block.norm2, block.mlp):
                    yield from part.modules()


class GlobalBatchNorm(nn.Module):
    """BatchNorm without affine terms, over features without gradients, with the statistics of all ranks' batch.

    Equal to `nn.BatchNorm1d(D, affine=False, eps=1e-6)` on the whole batch, in float32 whatever the model's precision.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, eps: float = 1e-6, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return x [B, D] normalised, float32."""
        x = x.detach().float()
        if not self.training:
            return (x - self.running_mean) * torch.rsqrt(self.running_var + self.eps)
        count = _over_ranks(torch.tensor(float(len(x)), device=x.device))
        mean = _over_ranks(x.sum(0)) / count  # [D]
        var = _over_ranks(((x - mean) ** 2).sum(0)) / count  # [D]
        # Features that are not finite lead to a step that is skipped: they must not stay in the statistics either.
        finite = torch.isfinite(mean.sum() + var.sum())
        for kept, new in ((self.running_mean, mean), (self.running_var, var * count / (count - 1))):
            kept.copy_(torch.where(finite, kept.lerp(new, self.momentum), kept))
        return (x - mean) * torch.rsqrt(var + self.eps)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the module; the statistics stay float32 (in bf16 they would stop following the mean)."""
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
        return self


def build_classifier(
    name: str | None = None,
    *,
    classes: int,
    image_size: ImageSize = 224,
    patch_size: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    pool: str = "mean",
    batch_norm: bool = False,
    trained_blocks: float | None = None,
    drop_path: float = 0.0,
    layer_scale: float | None = None,
) -> Classifier:
    """Return a classifier with fresh weights (drawn from torch's generator).

    name: one of `mae_scale.models.vit.SIZES`; patch_size (px), width, depth and heads override it, or all are given.
    image_size: the images' side in pixels, or their (height, width); multiples of the patch size.
    pool: "mean" of the patch tokens, then LayerNorm; or "cls", the class token after the encoder's norm.
    batch_norm: an affine-free BatchNorm in front of the head; only with a frozen encoder.
    trained_blocks: None trains everything; k the last k blocks, the norm after them and the head; 0.5 (1.5, ...) also
        the MLP of the block before; 0 the head alone. The rest has requires_grad False.
    layer_scale: with it the encoder is BEiT's, with a table of relative position biases per block; it is the initial
        scale of each branch.
    Raises UsageError naming what does not fit.
    """
    size = resolve_size(name, patch_size=patch_size, width=width, depth=depth, heads=heads)
    if pool not in ("mean", "cls"):
        raise UsageError(f"pool is {pool!r}; expected mean or cls")
    if classes < 2:
        raise UsageError(f"a classifier of {classes} classes; expected at least 2")
    if batch_norm and trained_blocks != 0:
        raise UsageError(
            f"classifier.batch_norm needs a frozen encoder (classifier.trained_blocks=0), found {trained_blocks}"
        )
    if trained_blocks is not None and not (0 <= trained_blocks <= size.depth and 2 * trained_blocks % 1 == 0):
        raise UsageError(
            f"classifier.trained_blocks={trained_blocks:g} does not fit a model of {size.depth} blocks; "
            f"expected 0, 0.5, 1, 1.5, ... up to {size.depth}, or null for everything"
        )
    return Classifier(
        size,
        image_size=image_size,
        classes=classes,
        pool=pool,
        batch_norm=batch_norm,
        trained_blocks=trained_blocks,
        drop_path=drop_path,
        layer_scale=layer_scale,
    )


def _over_ranks(value: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value
