"""Hugging Face's ViTMAEForPreTraining in the size, and with the weights, of a model of ours."""

from torch import nn


def peer_is_installed() -> bool:
    """Return whether transformers can be imported."""
    try:
        from transformers import ViTMAEForPreTraining  # noqa: F401
    except ImportError:
        return False
    return True


def make_peer(ours: nn.Module) -> nn.Module:
    """Return Hugging Face's model with the size and the weights of ours, on the same device."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    from transformers.utils import logging

    from mae_scale.models.weights.autoencoder import to_hf

    size, decoder = ours.encoder.size, ours.decoder
    width, heads = decoder.norm.normalized_shape[0], decoder.blocks[0].attn.num_heads
    config = ViTMAEConfig(
        image_size=ours.image_size,
        patch_size=size.patch_size,
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=len(decoder.blocks),
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=4 * width,
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
        mask_ratio=ours.mask_ratio,
        attn_implementation="sdpa",
    )
    logging.disable_progress_bar()
    # Names of its modules differ between versions of transformers: let it map those of its files itself.
    peer, found = ViTMAEForPreTraining.from_pretrained(
        None, config=config, state_dict=to_hf(ours), output_loading_info=True
    )
    left = {key: sorted(names) for key, names in found.items() if names}
    assert not left, f"the peer did not take all weights: {left}"
    for name, parameter in peer.named_parameters():
        if name.endswith(("position_embeddings", "pos_embed")):  # fixed in the paper; trained in some versions
            parameter.requires_grad_(False)
    return peer.to(ours.encoder.pos_embed.device)


def layers_of(peer: nn.Module) -> list[nn.Module]:
    """Return the transformer layers, the encoder's then the decoder's, whatever their class is called.

    Raises AssertionError when they are not as many as the configuration says.
    """
    stacks = [module for module in peer.modules() if isinstance(module, nn.ModuleList) and len(module)]
    layers = [layer for stack in stacks for layer in stack if any(isinstance(m, nn.LayerNorm) for m in layer.modules())]
    expected = peer.config.num_hidden_layers + peer.config.decoder_num_hidden_layers
    assert len(layers) == expected, f"found {len(layers)} transformer layers in the peer, expected {expected}"
    return layers
