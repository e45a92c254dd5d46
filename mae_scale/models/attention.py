"""The attention weights of a classifier's last block, which fused attention does not give."""

from typing import cast

import torch
from timm.layers.attention import Attention
from torch import Tensor

from mae_scale.models.beit import BeitAttention, BeitEncoder
from mae_scale.models.classifier import Classifier


@torch.inference_mode()
def last_attention(model: Classifier, images: Tensor) -> Tensor:
    """Return the last block's attention to each patch, float32 [N, heads, L], of normalised images [N, 3, H, W].

    It is that of the pooled token: the cls token, or with pool "mean" the mean over all patches. Attention to the cls
    token is left out, so that the L numbers sum to at most 1.
    """
    attention = cast(Attention | BeitAttention, model.encoder.blocks[-1].attn)
    caught: list[Tensor] = []
    hook = attention.qkv.register_forward_hook(lambda module, inputs, output: caught.append(output))
    try:
        model.features(images)
    finally:
        hook.remove()
    count, tokens, _ = caught[0].shape  # [N, 1 + L, 3 * D]
    qkv = caught[0].float().reshape(count, tokens, 3, attention.num_heads, attention.head_dim)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, 1 + L, D / heads]
    query = query[:, :, 1:] if model.pool == "mean" else query[:, :, :1]  # [N, heads, Q, D / heads]
    scores = query @ key.transpose(-2, -1) * attention.scale  # [N, heads, Q, 1 + L]
    if isinstance(attention, BeitAttention):
        bias = attention.bias(cast(BeitEncoder, model.encoder).rows)  # [1, heads, 1 + L, 1 + L]
        scores = scores + (bias[:, :, 1:] if model.pool == "mean" else bias[:, :, :1])
    weights = scores.softmax(-1)
    return weights[..., 1:].mean(2)
