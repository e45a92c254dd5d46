"""FLOPs: formulas that equal what the real model does, and the published tables."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.errors import UsageError
from mae_scale.models.mae import build_mae
from mae_scale.planning.flops import mae_forward_flops, mfu, training_flops, vit_forward_macs

NAMES = ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14")


def counted(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "image_size", "published"),
    [
        ("vit_base_patch16", 224, 17.58),
        ("vit_large_patch16", 224, 61.60),
        ("vit_huge_patch14", 224, 167.40),
        ("vit_huge_patch14", 448, 732.13),
    ],
)
def test_encoder_gmacs_are_the_published_ones(name, image_size, published):
    macs = vit_forward_macs(name, image_size=image_size, num_classes=1000, layer_norms=True)
    assert macs / 1e9 == pytest.approx(published, abs=5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_formulas_equal_what_the_model_computes(name):
    with torch.device("meta"):
        model, slow = build_mae(name), build_mae(name, encoder_mask_tokens=True)
        images, noise = torch.empty(2, 3, 224, 224), torch.empty(2, model.patches)
        assert counted(model, images, noise) == 2 * mae_forward_flops(name)
        assert counted(slow, images, noise) == 2 * mae_forward_flops(name, way="encoder_mask_tokens")
        assert counted(model.forward_features, images) == 2 * 2 * vit_forward_macs(name)


def test_the_plain_way_equals_what_hugging_face_computes():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig())
        total = counted(lambda: model(torch.empty(2, 3, 224, 224), noise=torch.empty(2, 196)))
    assert total == 2 * mae_forward_flops("vit_base_patch16", way="plain")


def test_other_sizes_and_targets_are_counted():
    sizes = {"patch_size": 8, "width": 32, "depth": 2, "decoder_width": 16, "decoder_depth": 1}
    with torch.device("meta"):
        model = build_mae(None, image_size=64, heads=2, decoder_heads=2, mask_ratio=0.6, target="pixels", **sizes)
        total = counted(model, torch.empty(1, 3, 64, 64), torch.empty(1, 64))
    assert total == mae_forward_flops(image_size=64, mask_ratio=0.6, **sizes)
    smaller = mae_forward_flops(image_size=64, mask_ratio=0.6, target_dim=96, **sizes)
    assert total - smaller == 2 * (64 - 25) * 16 * (192 - 96)


@pytest.mark.parametrize("name", NAMES)
def test_the_fast_way_costs_less_and_mask_tokens_much_more(name):
    fast, plain, slow = (mae_forward_flops(name, way=way) for way in ("fast", "plain", "encoder_mask_tokens"))
    assert fast < plain < slow
    assert slow > 2 * fast


def test_mfu_is_the_share_of_the_peak():
    forward = mae_forward_flops("vit_large_patch16")
    assert training_flops(forward) == 3 * forward
    rate = 8 * 312e12 / (3 * forward) / 2
    assert mfu(rate, training_flops=3 * forward, peak_flops_per_s=312e12, devices=8) == pytest.approx(0.5)


def test_an_unknown_way_is_refused():
    with pytest.raises(UsageError, match="fast, plain"):
        mae_forward_flops("vit_base_patch16", way="quick")
