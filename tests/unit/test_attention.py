"""The attention of a classifier's last block."""

import pytest
import torch

from mae_scale.models.attention import last_attention
from mae_scale.models.classifier import build_classifier
from mae_scale.models.weights.classifier import load_classifier


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_attention_is_that_of_hugging_faces_vit_with_the_same_weights(pool):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = transformers.ViTConfig(
        **sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6, num_labels=10, attn_implementation="eager"
    )
    torch.manual_seed(0)
    peer = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    build = {"classes": 10, "image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 4}
    source, model = build_classifier(**build, pool="cls"), build_classifier(**build, pool=pool).eval()
    load_classifier(source, peer.state_dict())
    model.encoder.load_state_dict(source.encoder.state_dict(), strict=False)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        weights = peer(images, output_attentions=True).attentions[-1]  # [N, heads, 1 + L, 1 + L]
    expected = weights[:, :, 0, 1:] if pool == "cls" else weights[:, :, 1:, 1:].mean(2)
    torch.testing.assert_close(last_attention(model, images), expected, atol=1e-5, rtol=1e-4)
    assert not model.encoder.blocks[-1].attn.qkv._forward_hooks
