"""Stochastic depth: timm's rates and timm's numbers, and a mask that follows from the position alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from data_pipeline.batch_layout import batch_layout
from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe
from mae_scale.engines.activation_checkpointing import checkpoint_activations
from mae_scale.engines.compilation import compile_blocks
from mae_scale.models.drop_path import DropPathBlock, draw_branch_scales, drop_path_rates
from mae_scale.models.mae import build_mae
from mae_scale.models.vit import layer_norm, patchify
from mae_scale.models.weights.autoencoder import to_timm
from mae_scale.tasks.mae.objective import Reconstruct

CPU = torch.device("cpu")
SIZES = {"width": 48, "depth": 3, "heads": 4, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4}


def small_mae(drop_path=0.6, **more):
    torch.manual_seed(0)
    return build_mae(None, image_size=32, patch_size=8, drop_path=drop_path, **{**SIZES, **more})


def batch_at(objective, positions, step=5):
    """What the objective reads of a loader's batch; each position's image is always the same."""
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    positions = np.asarray(positions)
    return SimpleNamespace(images=images[positions], drawn=objective.draw(step, positions))


def gradients_of(objective, tensors):
    objective.zero_grad()
    objective(*tensors).backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters()}


@pytest.fixture
def timm_drops(monkeypatch):
    """timm's own drop_path with the draws of our scales instead of torch's: call it with scales [B, depth, 2]."""

    def force(scales):
        draws = iter((scales > 0).float().flatten(1).T)

        def bernoulli_(tensor, keep):
            return tensor.copy_(next(draws).reshape(tensor.shape))

        monkeypatch.setattr(torch.Tensor, "bernoulli_", bernoulli_)
        return draws

    return force


@pytest.mark.parametrize(("drop_path", "depth"), [(0.3, 12), (0.1, 2), (0.5, 1), (0.0, 4)])
def test_rates_rise_from_zero_to_the_last_blocks_as_timms(drop_path, depth):
    rates = drop_path_rates(drop_path, depth)
    peer = VisionTransformer(
        img_size=16, embed_dim=8, num_heads=1, depth=depth, drop_path_rate=drop_path, num_classes=0, device="meta"
    )
    # timm's are rounded to float32
    for branch in ("drop_path1", "drop_path2"):
        theirs = [getattr(getattr(block, branch), "drop_prob", 0.0) for block in peer.blocks]
        assert rates == pytest.approx(theirs, abs=1e-7), branch
    assert small_mae(drop_path, depth=depth).encoder.drop_path_rates == rates


def test_a_rate_that_drops_everything_or_less_than_nothing_is_refused():
    for wrong in (1.0, -0.1):
        with pytest.raises(UsageError, match="drop_path"):
            small_mae(wrong)
        with pytest.raises(UsageError, match=r"model\.drop_path"):
            load_recipe("demo", [f"model.drop_path={wrong}"])
    assert load_recipe("demo", []).model.drop_path == 0.0


def test_branches_are_dropped_at_their_rates_independently_and_keep_their_expectation():
    rates, images = drop_path_rates(0.3, 4), 20_000
    scales = draw_branch_scales(rates, seed=3, step=9, positions=np.arange(images))
    assert scales.shape == (images, 4, 2)
    assert scales.dtype == torch.float32
    for number, rate in enumerate(rates):
        values = {0.0, float(np.float32(1 / (1 - rate)))} if rate else {1.0}
        assert set(scales[:, number].unique().tolist()) == values
    rate = torch.tensor(rates)[:, None].expand(4, 2)
    deviation = (rate / (1 - rate)).sqrt()  # of one scale: keep * (1 / keep - 1)^2 + rate = rate / (1 - rate)
    torch.testing.assert_close(scales.mean(0), torch.ones(4, 2), atol=4 * deviation.max() / images**0.5, rtol=0)
    torch.testing.assert_close(scales.std(0), deviation, atol=0.02, rtol=0)
    dropping = scales[:, 1:].reshape(images, 6)
    correlation = torch.corrcoef(dropping.T) - torch.eye(6)
    assert correlation.abs().max() < 4 / images**0.5
    following = torch.stack([torch.corrcoef(torch.stack([c[1:], c[:-1]]))[0, 1] for c in dropping.T])
    assert following.abs().max() < 4 / images**0.5


def test_branches_follow_from_seed_step_and_position_alone():
    rates = drop_path_rates(0.5, 24)

    def drawn(positions, seed=1, step=2):
        return draw_branch_scales(rates, seed=seed, step=step, positions=np.asarray(positions))

    torch.manual_seed(0)
    whole = drawn(range(512))
    torch.manual_seed(1)
    for ranks in (1, 2, 8):
        for micro_batch in (1, 8, 24, 64):
            for rank in range(ranks):
                mine = range(512)[batch_layout(512, ranks).positions(rank)]
                parts = [drawn(mine[first : first + micro_batch]) for first in range(0, len(mine), micro_batch)]
                assert torch.equal(torch.cat(parts), whole[mine])
    assert torch.equal(drawn([300, 7, 64, 63]), whole[[300, 7, 64, 63]])
    assert len({one.numpy().tobytes() for one in whole}) == 512
    assert not torch.equal(drawn(range(512), step=3), whole)
    assert not torch.equal(drawn(range(512), seed=2), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_equals_timms_with_the_same_draws(dtype, timm_drops):
    torch.manual_seed(0)
    options = {"mlp_ratio": 4.0, "qkv_bias": True, "norm_layer": layer_norm}
    ours, theirs = DropPathBlock(48, 4, **options), Block(48, 4, drop_path=0.4, **options)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.to(dtype), theirs.to(dtype)
    scales = draw_branch_scales([0.4], seed=0, step=0, positions=np.arange(16))
    assert 0 < (scales == 0).float().mean() < 1
    x = torch.randn(16, 5, 48, dtype=dtype)
    left = timm_drops(scales)
    expected = theirs(x)
    assert next(left, None) is None
    mine = ours(x, scales[:, 0])
    assert mine.dtype == dtype
    assert torch.equal(mine, expected)
    assert torch.equal(ours(x), theirs.eval()(x))


def test_features_and_gradients_equal_timms_vision_transformer_with_the_same_draws(timm_drops):
    ours = small_mae(0.5)
    theirs = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=0, drop_path_rate=0.5
    )
    theirs.load_state_dict(to_timm(ours), strict=True)
    images = torch.randn(8, 3, 32, 32)
    scales = draw_branch_scales(ours.encoder.drop_path_rates, seed=0, step=0, positions=np.arange(8))
    timm_drops(scales[:, 1:])  # timm's first block has the rate 0 and draws nothing
    expected = theirs.forward_features(images)
    features = ours.encoder(patchify(images, 8), branch_scales=scales)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    weights = torch.randn_like(features)
    (features * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, peer in zip(ours.encoder.blocks.parameters(), theirs.blocks.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, peer.grad, atol=1e-4, rtol=1e-4)


def test_a_dropped_branch_has_no_part_in_the_image():
    encoder = small_mae().encoder
    patches = torch.randn(4, 16, 192)
    keep_all, drop_all = torch.ones(4, 3, 2), torch.zeros(4, 3, 2)
    torch.testing.assert_close(encoder(patches, branch_scales=keep_all), encoder(patches), atol=1e-6, rtol=0)
    positions = encoder.pos_embed.clone()
    tokens = torch.cat([encoder.cls_token.expand(4, -1, -1), encoder.patch_embed(patches) + positions[1:]], dim=1)
    assert torch.equal(encoder(patches, branch_scales=drop_all), encoder.norm(tokens))
    for block in range(3):
        for branch in range(2):
            scales = keep_all.clone()
            scales[2, block, branch] = 0
            same = (encoder(patches, branch_scales=scales) - encoder(patches)).abs().amax((1, 2)) < 1e-6
            assert same.tolist() == [True, True, False, True]


def test_an_images_loss_does_not_depend_on_its_micro_batch():
    objective = Reconstruct(small_mae(), seed=4)
    whole = objective.tensors(batch_at(objective, range(32)), CPU)
    assert [tuple(t.shape) for t in whole] == [(32, 3, 32, 32), (32, 16), (32, 3, 2)]
    rates = objective.model.encoder.drop_path_rates
    assert torch.equal(whole[2], draw_branch_scales(rates, seed=4, step=5, positions=np.arange(32)))
    for size in (1, 4, 16):
        parts = [
            objective.tensors(batch_at(objective, range(first, first + size)), CPU) for first in range(0, 32, size)
        ]
        for joined, expected in zip(zip(*parts, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(joined), expected)
        losses = torch.stack([objective(*part).detach() for part in parts])
        torch.testing.assert_close(losses.mean(), objective(*whole).detach(), atol=1e-6, rtol=0)


def test_without_a_rate_nothing_is_drawn_and_the_numbers_are_those_of_timms_blocks(monkeypatch):
    monkeypatch.setattr("mae_scale.tasks.mae.objective.draw_branch_scales", None)
    objective, dropping = Reconstruct(small_mae(0.0), seed=4), Reconstruct(small_mae(0.6), seed=4)
    assert list(objective.state_dict()) == list(dropping.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(objective.parameters(), dropping.parameters(), strict=True))
    tensors = objective.tensors(batch_at(objective, range(8)), CPU)
    assert len(tensors) == 2
    loss = objective(*tensors)
    assert torch.equal(dropping(*tensors), loss)
    for block in objective.model.encoder.blocks:
        block.forward = lambda x, block=block: Block.forward(block, x)
    assert torch.equal(objective(*tensors), loss)


def test_evaluation_drops_nothing():
    objective = Reconstruct(small_mae(), seed=4)
    tensors = objective.tensors(batch_at(objective, range(8)), CPU)
    assert not torch.equal(objective(*tensors), objective(*tensors[:2]))
    objective.eval()
    assert torch.equal(objective(*tensors)[0], objective(*tensors[:2])[0])


def test_scales_of_another_shape_are_refused():
    model = small_mae()
    images = torch.randn(4, 3, 32, 32)
    for shape in ((4, 2), (4, 5, 2), (1, 3, 2)):
        with pytest.raises(UsageError, match="branch_scales"):
            model(images, branch_scales=torch.ones(shape))


@pytest.mark.parametrize("policy", ["all", 2, "offload"])
def test_checkpointed_blocks_give_the_same_gradients_to_the_last_bit(policy):
    plain, checkpointed = Reconstruct(small_mae(), seed=4), Reconstruct(small_mae(), seed=4)
    checkpoint_activations(checkpointed.blocks, policy)
    tensors = plain.tensors(batch_at(plain, range(16)), CPU)
    expected = gradients_of(plain, tensors)
    torch.manual_seed(99)
    found = gradients_of(checkpointed, tensors)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_blocks_give_the_same_gradients_from_one_compilation():
    plain, compiled = Reconstruct(small_mae(), seed=4), Reconstruct(small_mae(), seed=4)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks(compiled.model.encoder.blocks)
    tensors = plain.tensors(batch_at(plain, range(16)), CPU)
    expected, found = gradients_of(plain, tensors), gradients_of(compiled, tensors)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_model_with_drop_path_can_be_built_and_run_in_fake_mode():
    with FakeTensorMode():
        model = build_mae("vit_large_patch16", drop_path=0.2)
        images, noise, scales = torch.randn(2, 3, 224, 224), torch.rand(2, 196), torch.ones(2, 24, 2)
        loss = model(images, noise, scales).loss
        loss.backward()
    assert loss.shape == ()
    assert isinstance(model.encoder.blocks[23].mlp.fc1.weight.grad, FakeTensor)
