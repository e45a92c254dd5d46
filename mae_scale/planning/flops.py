"""The arithmetic of a model from formulas, and its share of a GPU's peak.

One multiply-add (MAC) is two FLOPs. Only matrix products are counted: linear layers, and in attention the two
products of queries, keys and values. With N tokens of width D and an MLP four times as wide, a transformer
block costs 12 N D^2 + 2 N^2 D MACs: 3 (query, key, value), 1 (projection) and 8 (MLP) products with
D x D, and attention.
"""

from __future__ import annotations

import math

from data_pipeline.errors import UsageError
from data_pipeline.image_size import ImageSize
from mae_scale.models.masking import kept_patches
from mae_scale.models.vit import grid_shape, resolve_size

WAYS = ("fast", "plain", "encoder_mask_tokens")

_FVCORE_LAYER_NORM = 5  # operations that fvcore counts per value of a LayerNorm with affine terms


def _blocks_macs(tokens: int, width: int, depth: int) -> int:
    return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)


def vit_forward_macs(
    name: str | None = None,
    *,
    image_size: ImageSize = 224,
    patch_size: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    num_classes: int = 0,
    layer_norms: bool = False,
) -> int:
    """Return the MACs of one image through the encoder, with all its patches and the cls token.

    num_classes adds a linear head on one pooled feature; `layer_norms` adds LayerNorms as fvcore counts them, the last
    one after the pooling, as in published tables (17.58 G for ViT-B/16 with 1000 classes).
    """
    size = resolve_size(name, patch_size=patch_size, width=width, depth=depth, heads=None if name else 1)
    patches = math.prod(grid_shape(image_size, size.patch_size))
    tokens = 1 + patches
    macs = patches * 3 * size.patch_size**2 * size.width + _blocks_macs(tokens, size.width, size.depth)
    macs += num_classes * size.width
    if layer_norms:
        macs += _FVCORE_LAYER_NORM * size.width * (2 * size.depth * tokens + 1)
    return macs


def mae_forward_flops(
    name: str | None = None,
    *,
    image_size: ImageSize = 224,
    patch_size: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    mask_ratio: float = 0.75,
    decoder_width: int = 512,
    decoder_depth: int = 8,
    target_dim: int | None = None,
    way: str = "fast",
) -> int:
    """Return the FLOPs of one image through the masked autoencoder, forward, with the loss's prediction.

    way: "fast", ours: visible patches are embedded, removed ones predicted. "plain", the authors' code: every
    patch is embedded before most are dropped, every token predicted. "encoder_mask_tokens", the paper's
    ablation: as "fast", but the encoder computes all tokens. target_dim is p*p*3 when not given.
    """
    if way not in WAYS:
        raise UsageError(f"unknown way {way!r}: expected one of {', '.join(WAYS)}")
    size = resolve_size(name, patch_size=patch_size, width=width, depth=depth, heads=None if name else 1)
    pixels = 3 * size.patch_size**2
    patches = math.prod(grid_shape(image_size, size.patch_size))
    kept = kept_patches(patches, mask_ratio)
    embedded = patches if way == "plain" else kept
    encoded = 1 + (patches if way == "encoder_mask_tokens" else kept)
    predicted = 1 + patches if way == "plain" else patches - kept
    macs = embedded * pixels * size.width
    macs += _blocks_macs(encoded, size.width, size.depth)
    macs += encoded * size.width * decoder_width
    macs += _blocks_macs(1 + patches, decoder_width, decoder_depth)
    macs += predicted * decoder_width * (pixels if target_dim is None else target_dim)
    return 2 * macs


def training_flops(forward_flops: int) -> int:
    """Return the FLOPs of a training step per image: forward, and twice that for the two gradients of each product.

    Recomputation by activation checkpointing is not counted, as usual for MFU (Chowdhery et al., arXiv 2204.02311,
    appendix B).
    """
    return 3 * forward_flops


def mfu(images_per_second: float, *, training_flops: int, peak_flops_per_s: float, devices: int = 1) -> float:
    """Return the model FLOPs utilisation: the share, 0 to 1, of the devices' peak that training at that rate uses.

    images_per_second over all devices; training_flops per image; peak_flops_per_s of one device.
    """
    return images_per_second * training_flops / (peak_flops_per_s * devices)
