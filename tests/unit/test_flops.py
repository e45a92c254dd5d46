"""FLOPs: formulas that equal what the real model does, and the published tables."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe
from mae_scale.models.build import build_beit, build_moco_of, build_model
from mae_scale.models.mae import build_mae
from mae_scale.models.tokeniser import Tokeniser, TokeniserSize
from mae_scale.planning.flops import mae_forward_flops, mfu, training_flops, vit_forward_macs
from mae_scale.tasks.beit.objective import PredictRemoved
from mae_scale.tasks.mae.objective import Reconstruct
from mae_scale.tasks.moco.objective import Contrast
from mae_scale.tasks.registry import task_of

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


PREDICTING = ("pretrain/beit_vit_base_800ep", "pretrain/beit_vit_base_pixels_300ep", "pretrain/vit_large_tokens_800ep")


@pytest.mark.parametrize("name", PREDICTING)
def test_flops_of_beit_and_of_words_are_those_that_torch_counts_in_the_model_and_the_tokeniser(name):
    recipe = load_recipe(name)
    is_beit, words = recipe.task == "beit", recipe.model.target == "tokens"
    with torch.device("meta"):
        if is_beit:
            objective = PredictRemoved(build_beit(recipe, 8192), None, seed=0, global_batch=2)
        else:
            objective = Reconstruct(build_model(recipe, 8192), seed=0)
        drawn = [torch.zeros(2, 196, dtype=torch.bool), torch.ones(2)] if is_beit else [torch.rand(2, 196)]
        drawn += [torch.zeros(2, 196, dtype=torch.int64)] if words else []
        own = counted(objective, torch.empty(2, 3, 224, 224), *drawn)
        tokeniser = counted(Tokeniser(TokeniserSize()).tokens, torch.empty(2, 3, 112, 112)) if words else 0
    task = task_of(recipe, Path())
    assert own + tokeniser == 2 * task.workload(1000).forward_flops
    assert 3 * own + tokeniser == 2 * task.training_flops()


def test_flops_of_moco_v3_are_those_that_torch_counts_but_for_the_similarities():
    """Forward and backward: the frozen projection and the momentum encoder have no gradients."""
    sizes = {"name": "null", "image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
    overrides = [f"model.{key}={value}" for key, value in sizes.items()]
    recipe, batch = load_recipe("pretrain/moco_v3_vit_base", [*overrides, "moco.hidden=48", "moco.dim=16"]), 4
    objective, views = Contrast(build_moco_of(recipe), temperature=0.2), torch.randn(2, batch, 3, 32, 32)
    with sdpa_kernel(SDPBackend.MATH):  # of which torch counts two products backward for each one forward
        total = counted(lambda: objective(*views).backward())
    similarities = 2 * 2 * batch * batch * 16  # of each direction
    assert total == batch * task_of(recipe, Path()).training_flops() + 2 * similarities


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
