"""The masked autoencoder: the same numbers as its peers, and the promises of its forward pass."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.errors import UsageError
from mae_scale.models.mae import build_mae
from mae_scale.models.targets import NormalisedPixels
from mae_scale.models.vit import parameter_count, patchify, unpatchify
from mae_scale.models.weights.autoencoder import load_hf, to_hf, to_timm

transformers = pytest.importorskip("transformers")

SMALL = {"width": 48, "depth": 3, "heads": 4, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4}


def small_mae(patch_size=16, grid=4, **more):
    return build_mae(None, image_size=patch_size * grid, patch_size=patch_size, **{**SMALL, **more})


def hf_mae(patch_size=16, grid=4, normalised=True):
    config = transformers.ViTMAEConfig(
        image_size=patch_size * grid,
        patch_size=patch_size,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        layer_norm_eps=1e-6,
        norm_pix_loss=normalised,
        mask_ratio=0.75,
    )
    return transformers.ViTMAEForPreTraining(config)


def fresh_hf_mae(patch_size, normalised):
    """With its positions set by its own function: some versions of transformers leave them zero."""
    model = hf_mae(patch_size, normalised=normalised)
    with torch.no_grad():
        for positions in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            positions.copy_(hf_positions(positions.shape[-1], 4))
    return model


def hf_positions(width, grid):
    build = transformers.models.vit_mae.modeling_vit_mae.build_2d_sinusoidal_position_embedding
    positions = build(grid, grid, width, cls_token=True)
    return torch.cat([positions[:, width // 2 :], positions[:, : width // 2]], dim=1)


def batch(model, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, model.image_size, model.image_size, generator=generator)
    return images, torch.rand(size, model.patches, generator=generator)


def randomise(module):
    """Biases and norms away from zero and one, so that none of them can be forgotten without being seen."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("start", ["ours", "theirs"])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("patch_size", [16, 14])
def test_loss_prediction_mask_and_every_gradient_equal_hugging_face(patch_size, normalised, start, tmp_path):
    ours = small_mae(patch_size, target="normalised_pixels" if normalised else "pixels")
    theirs = fresh_hf_mae(patch_size, normalised)
    if start == "ours":
        randomise(ours)
        theirs.config.save_pretrained(tmp_path)
        save_file(to_hf(ours), tmp_path / "model.safetensors", metadata={"format": "pt"})
        theirs = type(theirs).from_pretrained(tmp_path).train()
    else:
        randomise(theirs)
        load_hf(ours, theirs.state_dict())
    images, noise = batch(ours)

    out = ours(images, noise)
    out.loss.backward()
    expected = theirs(pixel_values=images, noise=noise)
    expected.loss.backward()

    assert torch.equal(out.mask, expected.mask)
    torch.testing.assert_close(out.loss, expected.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.prediction, expected.logits, atol=1e-5, rtol=0)
    # Their gradients loaded as if they were weights, so that the conversion brings each to its counterpart.
    gradients = {name: p if "pos" in name else p.grad for name, p in theirs.named_parameters()}
    other = small_mae(patch_size)
    load_hf(other, gradients)
    names = [name for name, _ in ours.named_parameters()]
    assert len(names) == 12 * 5 + 12
    for name in names:
        mine, peers = ours.get_parameter(name).grad, other.get_parameter(name).data
        assert mine.abs().max() > 0, name
        assert (mine - peers).abs().max() <= 1e-5 * min(1.0, 2 * mine.abs().max()), name


def test_features_equal_timm_for_converted_weights():
    ours = small_mae().eval()
    randomise(ours)
    theirs = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=48, depth=3, num_heads=4, num_classes=0, global_pool="token"
    ).eval()
    theirs.load_state_dict(to_timm(ours), strict=True)
    images, _ = batch(ours)
    with torch.no_grad():
        features = ours.forward_features(images)
        assert features.shape == (4, 17, 48)
        torch.testing.assert_close(features, theirs.forward_features(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "encoder_with_head", "whole"),
    [
        ("vit_base_patch16", 86.57, 111.91),
        ("vit_large_patch16", 304.33, 329.54),
        ("vit_huge_patch14", 632.05, 657.07),
    ],
)
def test_parameter_counts_are_the_published_ones(name, encoder_with_head, whole):
    """In millions; published counts include the fixed positions."""
    with torch.device("meta"):
        model = build_mae(name)
    head = 1000 * (model.encoder.size.width + 1)
    assert (parameter_count(model.encoder, positions=True) + head) / 1e6 == pytest.approx(encoder_with_head, abs=5e-3)
    assert parameter_count(model, positions=True) / 1e6 == pytest.approx(whole, abs=5e-3)
    assert len(model.blocks) == model.encoder.size.depth + 8


class _NoSynchronisation(TorchDispatchMode):
    """Fails on the operations that wait for the device or give shapes that depend on data."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in str(func) for word in self.forbidden), f"{func} synchronises with the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", [{}, {"encoder_mask_tokens": True}, {"target": "pixels"}, {"target": "pca"}])
def test_a_training_step_never_waits_for_the_device(variant):
    model = small_mae(**variant)
    images, noise = batch(model)
    if variant.get("target") == "pca":
        model.target.fit(patchify(torch.randn(8, 3, 64, 64), 16).flatten(0, 1))
    with _NoSynchronisation():
        for given in (noise, None):
            out = model(images, given)
            out.loss.backward()
            assert out.prediction.shape[:2] == (4, 16)
    with pytest.raises(AssertionError, match="synchronises"), _NoSynchronisation():
        images.sum().item()


def test_forward_runs_on_the_meta_device():
    with torch.device("meta"):
        model = small_mae()
        out = model(torch.empty(2, 3, 64, 64), torch.empty(2, 16))
    assert out.loss.shape == ()
    assert out.prediction.shape == (2, 16, 768)


@pytest.mark.parametrize("encoder_mask_tokens", [False, True])
def test_a_removed_patch_cannot_influence_the_encoder(encoder_mask_tokens):
    model = small_mae(encoder_mask_tokens=encoder_mask_tokens)
    images, noise = batch(model)
    seen = []
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(output))
    out = model(images, noise)
    patches = patchify(images, 16)
    removed = out.mask.bool().unsqueeze(-1)
    other = unpatchify(torch.where(removed, torch.randn_like(patches) * 100, patches), 16)
    changed = model(other, noise)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(out.prediction, changed.prediction)
    assert not torch.equal(out.loss, changed.loss)
    model(unpatchify(torch.where(removed, patches, patches + 1), 16), noise)
    assert not torch.equal(seen[0], seen[2])


def test_removed_patches_are_not_embedded_and_visible_ones_not_predicted_until_asked():
    model = small_mae()
    embedded, predicted = [], []
    model.encoder.patch_embed.register_forward_hook(lambda m, args, out: embedded.append(tuple(args[0].shape)))
    model.head.register_forward_hook(lambda m, args, out: predicted.append(tuple(args[0].shape)))
    out = model(*batch(model))
    assert embedded == [(4, 4, 768)]
    assert predicted == [(4, 12, 32)]
    assert out.prediction is out.prediction
    assert predicted == [(4, 12, 32), (4, 16, 32)]


def test_loss_is_the_mean_over_removed_patches_only():
    model = small_mae(mask_ratio=0.5)
    images, noise = batch(model)
    out = model(images, noise)
    assert out.mask.sum(dim=1).tolist() == [8.0] * 4
    target = NormalisedPixels(16)(patchify(images, 16))
    each = (out.prediction - target).square().mean(dim=-1)
    torch.testing.assert_close(out.loss, (each * out.mask).sum() / out.mask.sum(), atol=1e-6, rtol=0)


def test_patches_of_smallest_noise_stay_visible_and_the_earlier_of_equals():
    model = small_mae()
    noise = torch.ones(1, 16)
    noise[0, 5] = 0
    mask = model(torch.randn(1, 3, 64, 64), noise).mask
    assert (mask[0] == 0).nonzero().flatten().tolist() == [0, 1, 2, 5]


def test_mask_tokens_in_the_encoder_change_the_result_and_learn():
    torch.manual_seed(1)
    slow = small_mae(encoder_mask_tokens=True)
    torch.manual_seed(1)
    fast = small_mae()
    images, noise = batch(slow)
    out = slow(images, noise)
    assert out.prediction.shape == (4, 16, 768)
    assert not torch.allclose(out.loss, fast(images, noise).loss)
    out.loss.backward()
    assert slow.encoder.mask_token.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in slow.parameters())
    assert slow.no_weight_decay() == {"encoder.cls_token", "encoder.mask_token"}
    assert fast.no_weight_decay() == {"encoder.cls_token", "decoder.mask_token"}


def test_bfloat16_weights_train_with_an_fp32_loss_on_fp32_targets():
    model = small_mae()
    images, noise = batch(model)
    exact = model(images, noise).loss
    model.bfloat16()
    out = model(images, noise)
    assert out.loss.dtype == torch.float32
    assert out.prediction.dtype == torch.bfloat16
    assert model(images.bfloat16(), noise).loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact, atol=0.02, rtol=0)
    out.loss.backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())


def test_autocast_follows_fp32():
    model = small_mae()
    images, noise = batch(model)
    exact = model(images, noise).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images, noise)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss, exact, atol=0.02, rtol=0)


@pytest.mark.parametrize("masking", ["random", "block", "grid"])
def test_without_noise_masks_follow_the_torch_seed(masking):
    model = small_mae(masking=masking)
    images, _ = batch(model, size=8)
    torch.manual_seed(3)
    first = model(images).mask
    torch.manual_seed(3)
    assert torch.equal(first, model(images).mask)
    assert first.sum(dim=1).tolist() == [12.0] * 8
    assert (masking == "grid") == torch.equal(first, model(images).mask)


def test_unpatchify_undoes_patchify():
    images = torch.randn(2, 3, 28, 28)
    patches = patchify(images, 14)
    assert patches.shape == (2, 4, 588)
    assert torch.equal(patches[0, 1, :3], images[0, :, 0, 14])
    assert torch.equal(unpatchify(patches, 14), images)


def test_positions_follow_the_release_column_first():
    model = small_mae()
    positions = model.encoder.pos_embed[1:].reshape(4, 4, 48)
    assert model.encoder.pos_embed[0].abs().max() == 0
    np.testing.assert_array_equal(positions[0, 2, :24], positions[3, 2, :24])
    np.testing.assert_array_equal(positions[2, 0, 24:], positions[2, 3, 24:])
    assert positions[0, 2, 0] == pytest.approx(np.sin(2.0))


def test_wrong_sizes_are_refused_by_name():
    with pytest.raises(UsageError, match="depth, heads"):
        build_mae(None, patch_size=16, width=32)
    with pytest.raises(UsageError, match="vit_base_patch16"):
        build_mae("vit_giant")
    with pytest.raises(UsageError, match="nearest that fits is 224"):
        build_mae("vit_base_patch16", image_size=230)
    with pytest.raises(UsageError, match="mask_ratio"):
        small_mae(mask_ratio=1.0)
    model = small_mae()
    with pytest.raises(UsageError, match="image_size"):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(UsageError, match="noise"):
        model(torch.randn(1, 3, 64, 64), torch.rand(1, 9))


def test_explicit_sizes_override_those_of_the_name():
    with torch.device("meta"):
        model = build_mae("vit_large_patch16", depth=2, decoder_depth=1)
    assert (model.encoder.size.width, len(model.encoder.blocks), len(model.decoder.blocks)) == (1024, 2, 1)
