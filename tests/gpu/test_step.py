"""One training step on the GPU: the peer's numbers, no waiting of the host, compiled and checkpointed blocks."""

import gc
import time

import pytest
import torch

from mae_scale.engines.activation_checkpointing import checkpoint_activations
from mae_scale.engines.compilation import compile_blocks
from mae_scale.engines.host_copy import HostCopy
from mae_scale.models.mae import build_mae

pytestmark = pytest.mark.timeout(300)

DEVICE = torch.device("cuda")
SIZES = {"width": 192, "depth": 4, "heads": 3, "decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4}


def small_mae(patch_size=16, grid=8, **more):
    torch.manual_seed(0)
    return build_mae(None, image_size=patch_size * grid, patch_size=patch_size, **{**SIZES, **more}).to(DEVICE)


def batch(model, size=8):
    random = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, model.image_size, model.image_size, generator=random)
    return images.to(DEVICE), torch.rand(size, model.patches, generator=random).to(DEVICE)


def in_bf16():
    return torch.autocast(DEVICE.type, torch.bfloat16)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)


def train(model, steps=5, size=8):
    """The losses of some float32 steps on one batch."""
    images, noise = batch(model, size)
    optimizer, losses = adamw(model), []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = model(images, noise).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def with_peer(patch_size):
    """Our model and Hugging Face's with the same weights."""
    transformers = pytest.importorskip("transformers")
    from mae_scale.models.weights.autoencoder import load_hf

    ours = small_mae(patch_size)
    config = transformers.ViTMAEConfig(
        image_size=ours.image_size,
        patch_size=patch_size,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=768,
        decoder_hidden_size=128,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=512,
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
        mask_ratio=0.75,
        attn_implementation="sdpa",
    )
    theirs = transformers.ViTMAEForPreTraining(config).to(DEVICE).train()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
        theirs.vit.embeddings.position_embeddings.copy_(ours.encoder.pos_embed[None])
        theirs.decoder.decoder_pos_embed.copy_(ours.decoder.pos_embed[None])
    load_hf(ours, theirs.state_dict())
    return ours, theirs


def gradients_of(theirs, like):
    """The peer's gradients under our names: loaded as if they were weights."""
    from mae_scale.models.weights.autoencoder import load_hf

    other = small_mae(like.patch_size)
    load_hf(other, {name: p if "pos" in name else p.grad for name, p in theirs.named_parameters()})
    return {name: p.data for name, p in other.named_parameters()}


@pytest.mark.parametrize("patch_size", [16, 14])
def test_float32_loss_prediction_and_gradients_equal_hugging_face(patch_size):
    ours, theirs = with_peer(patch_size)
    images, noise = batch(ours)
    out = ours(images, noise)
    out.loss.backward()
    expected = theirs(pixel_values=images, noise=noise)
    expected.loss.backward()
    assert torch.equal(out.mask, expected.mask)
    torch.testing.assert_close(out.loss, expected.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.prediction, expected.logits, atol=1e-4, rtol=0)
    peers = gradients_of(theirs, ours)
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, peers[name], atol=1e-5, rtol=1e-3, msg=name)


def test_bf16_is_as_close_to_float32_as_hugging_face_is():
    ours, theirs = with_peer(16)
    images, noise = batch(ours)
    exact = ours(images, noise).loss
    exact.backward()
    gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}
    ours.zero_grad()
    with in_bf16():
        mine, peers = ours(images, noise).loss, theirs(pixel_values=images, noise=noise).loss
    assert mine.dtype == torch.float32
    mine.backward()
    peers.backward()
    assert mine.item() == pytest.approx(exact.item(), rel=5e-3)
    assert mine.item() == pytest.approx(peers.item(), rel=5e-3)

    def distance(found):
        error = sum((found[name] - gradients[name]).square().sum() for name in gradients)
        return (error / sum(g.square().sum() for g in gradients.values())).sqrt().item()

    own = distance({name: p.grad for name, p in ours.named_parameters()})
    assert 0 < own < 0.05
    assert own < 2 * distance(gradients_of(theirs, ours))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_cast_as_deepspeed_casts_them_follow_float32(dtype):
    model = small_mae()
    images, noise = batch(model)
    exact = model(images, noise).loss.item()
    assert model.to(dtype)(images, noise).loss.item() == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("masking", ["noise given", "noise drawn"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_makes_the_host_wait(precision, masking):
    model = small_mae()
    images, noise = batch(model)
    noise = noise if masking == "noise given" else None
    optimizer = adamw(model)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(images, noise).loss
        loss.backward()
        optimizer.step()
        return loss

    step()  # allocates and chooses kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            loss.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() > 0


def test_a_number_is_copied_to_the_host_without_a_wait_and_read_as_it_was():
    number = torch.zeros((), device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        number.fill_(3.0)
        copy = HostCopy(number)
        number.fill_(4.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda._sleep(10**9)  # what is launched since: half a second
    began = time.perf_counter()
    assert copy() == 3.0
    assert time.perf_counter() - began < 0.1


def test_compiled_blocks_give_the_same_losses():
    plain, compiled = small_mae(), small_mae()
    torch.compiler.reset()
    compile_blocks(compiled.blocks)
    checkpointed = small_mae()
    compile_blocks(checkpointed.blocks)
    checkpoint_activations(checkpointed.blocks, "all")
    expected = train(plain)
    assert train(compiled) == pytest.approx(expected, abs=1e-4)
    assert train(checkpointed) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0]


def peak_bytes(policy):
    """Losses, and the most memory that two steps of a deeper model hold on the GPU."""
    gc.collect()
    model = small_mae(grid=14, width=384, depth=12, heads=6)
    checkpoint_activations(model.blocks, policy)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = train(model, steps=2, size=64)
    return losses, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(("policy", "share"), [("all", 0.6), (2, 0.85), ("offload", 0.6)])
def test_activation_checkpointing_keeps_the_losses_and_saves_memory(policy, share):
    if policy == "offload":
        pytest.importorskip("fairscale")
        pytest.importorskip("pydantic")
    expected, whole = peak_bytes("none")
    losses, saved = peak_bytes(policy)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert saved < share * whole, f"{saved / whole:.2f} of the memory without checkpointing"


def test_offloaded_activations_take_less_than_those_that_stay():
    pytest.importorskip("fairscale")
    pytest.importorskip("pydantic")
    _, kept = peak_bytes("all")
    _, offloaded = peak_bytes("offload")
    assert offloaded < kept
