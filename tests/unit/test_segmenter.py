"""UperNet on the dense encoder: transformers' head, BatchNorm of torch, and a loss that is a mean over images."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.upernet.modeling_upernet import UperNetHead

from data_pipeline.annotations.label_maps import IGNORED
from mae_scale.models.dense import DenseEncoder
from mae_scale.models.global_batch_norm import GlobalBatchNorm2d, with_global_statistics
from mae_scale.models.segmenter import Segmenter, pixel_losses
from mae_scale.models.vit import ViTSize

CLASSES = 5


@pytest.fixture(scope="module")
def model() -> Segmenter:
    torch.manual_seed(0)
    size = ViTSize(patch_size=4, width=16, depth=4, heads=2)
    encoder = DenseEncoder(size, image_size=(48, 48), pretraining_size=32, window=4, global_blocks=(1, 3))
    return Segmenter(encoder, classes=CLASSES, after=(0, 1, 2, 3), channels=12, auxiliary_channels=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_on_one_rank_is_torchs_in_training_and_after_it(dtype):
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(6)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours = with_global_statistics(nn.Sequential(copy.deepcopy(theirs)))[0]
    assert type(ours) is GlobalBatchNorm2d
    for _ in range(3):
        x = torch.randn(4, 6, 5, 3) * 2 + 1
        mine, peer = x.to(dtype).requires_grad_(), x.to(dtype).float().requires_grad_()
        found, expected = ours(mine), theirs(peer)
        assert found.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert torch.allclose(found.float(), expected, rtol=0, atol=tolerance)
        weight = torch.randn_like(expected)
        (found.float() * weight).sum().backward()
        (expected * weight).sum().backward()
        assert torch.allclose(mine.grad.float(), peer.grad, rtol=1e-2, atol=tolerance)
    assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-6)
    assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-5)
    x = torch.randn(2, 6, 5, 3)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)


def test_running_averages_stay_float32_and_follow_no_batch_that_is_not_finite():
    ours = GlobalBatchNorm2d(6).to(torch.bfloat16)
    assert ours.weight.dtype == torch.bfloat16
    assert ours.running_mean.dtype == ours.running_var.dtype == torch.float32
    ours(torch.randn(4, 6, 5, 3).to(torch.bfloat16))
    before = [one.clone() for one in (ours.running_mean, ours.running_var)]
    for value in (torch.nan, torch.inf):
        x = torch.randn(4, 6, 5, 3)
        x[1, 2, 3, 1] = value
        ours(x.to(torch.bfloat16))
    assert torch.equal(ours.running_mean, before[0])
    assert torch.equal(ours.running_var, before[1])


def test_logits_are_of_each_pixel_and_those_of_transformers_head(model):
    model.train()
    images = torch.randn(2, 3, 48, 48)
    logits, auxiliary = model(images)
    assert logits.shape == auxiliary.shape == (2, CLASSES, 48, 48)
    maps = model.encoder(images, after=model.after)
    maps = [scale(one) for scale, one in zip(model.scales, maps, strict=True)]
    assert [tuple(one.shape[2:]) for one in maps] == [(48, 48), (24, 24), (12, 12), (6, 6)]
    config = model.head.config
    peer = UperNetHead(config, [16] * 4)
    peer.load_state_dict(model.head.state_dict())
    expected = functional.interpolate(peer.train()(maps), size=(48, 48), mode="bilinear")
    assert torch.allclose(logits, expected, atol=1e-5)


def test_every_parameter_has_a_gradient(model):
    model.train().zero_grad()
    logits, auxiliary = model(torch.randn(2, 3, 48, 48))
    labels = torch.randint(0, CLASSES, (2, 48, 48))
    (pixel_losses(logits, labels) + pixel_losses(auxiliary, labels)).mean().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == set()


def test_a_loss_is_over_all_pixels_of_an_image_and_ignored_ones_add_nothing():
    logits = torch.randn(3, CLASSES, 4, 6)
    labels = torch.randint(0, CLASSES, (3, 4, 6))
    labels[1, :2] = IGNORED
    labels[2] = IGNORED
    found = pixel_losses(logits, labels)
    whole = functional.cross_entropy(logits[:1], labels[:1])
    half = functional.cross_entropy(logits[1:2, :, 2:], labels[1:2, 2:])
    assert found.tolist() == pytest.approx([whole.item(), half.item() / 2, 0])
