"""The classifier: what is pooled and trained, its BatchNorm, its layers, and what its objective is given."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from data_pipeline.batches import Batch
from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe
from mae_scale.engines.optimizers import parameter_groups
from mae_scale.models.classifier import GlobalBatchNorm, build_classifier
from mae_scale.models.weights.classifier import classifier_to_timm
from mae_scale.tasks.classification.objective import Classify

SIZE = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 4, "heads": 2}
IN_FULL = {"name": "vit_base_patch16"}


def build(**options):
    torch.manual_seed(0)
    return build_classifier(None, classes=10, **SIZE, **options)


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def block(number: int, *parts: str) -> set[str]:
    names = {n.removeprefix("encoder.blocks.0.") for n, _ in build().named_parameters() if ".blocks.0." in n}
    return {f"encoder.blocks.{number}.{n}" for n in names if not parts or n.split(".")[0] in parts}


HEAD, NORM = {"head.weight", "head.bias"}, {"fc_norm.weight", "fc_norm.bias"}


@pytest.mark.parametrize(
    ("blocks", "expected", "frozen"),
    [
        (0, HEAD, 4),
        (0.5, HEAD | NORM | block(3, "norm2", "mlp"), 3),
        (1, HEAD | NORM | block(3), 3),
        (1.5, HEAD | NORM | block(3) | block(2, "norm2", "mlp"), 2),
        (4, HEAD | NORM | block(0) | block(1) | block(2) | block(3), 0),
    ],
)
def test_partial_fine_tuning_trains_the_last_blocks_the_norm_and_the_head(blocks, expected, frozen):
    model = build(trained_blocks=blocks)
    assert trained(model) == expected
    assert model.frozen_blocks == frozen
    model.train()(torch.randn(2, 3, 16, 16)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected


def test_without_trained_blocks_everything_is_trained_positions_too():
    model = build()
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert "encoder.pos_embed" in trained(model)


def test_a_frozen_encoder_stays_in_evaluation_mode():
    model = build(trained_blocks=0, batch_norm=True, drop_path=0.5).train()
    assert not any(module.training for module in model.encoder.modules())
    assert model.batch_norm.training
    assert build().train().encoder.training


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_logits_are_timms_from_the_same_weights(pool):
    model = build(pool=pool).eval()
    nn.init.normal_(model.head.weight)
    peer = VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=4,
        num_heads=2,
        num_classes=10,
        global_pool="avg" if pool == "mean" else "token",
    ).eval()
    peer.load_state_dict(classifier_to_timm(model))
    images = torch.randn(3, 3, 16, 16)
    assert torch.allclose(model(images), peer(images), atol=1e-5)


def test_global_batch_norm_is_torchs_batch_norm():
    ours, theirs = GlobalBatchNorm(8), nn.BatchNorm1d(8, affine=False, eps=1e-6)
    for _ in range(5):
        x = torch.randn(16, 8) * 3 + 100
        assert torch.allclose(ours(x), theirs(x), atol=1e-4)
    assert torch.allclose(ours.running_mean, theirs.running_mean)
    assert torch.allclose(ours.running_var, theirs.running_var, rtol=1e-4)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-4)


def test_global_batch_norm_keeps_float32_statistics_in_a_bf16_model():
    norm = build(trained_blocks=0, batch_norm=True).bfloat16().batch_norm
    assert (norm.running_mean.dtype, norm.running_var.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"trained_blocks": 0.3}, "expected 0, 0.5, 1, 1.5, ... up to 4"),
        ({"trained_blocks": 5}, "does not fit a model of 4 blocks"),
        ({"batch_norm": True}, "needs a frozen encoder"),
        ({"pool": "max"}, "expected mean or cls"),
    ],
)
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        build(**options)


def test_layer_decay_groups_are_timms_and_the_papers_rule():
    with torch.device("meta"):
        model = build_classifier(**IN_FULL, classes=1000)
        peer = VisionTransformer(num_classes=1000, global_pool="avg")
    recipe = load_recipe("finetune/demo", ["optim.layer_decay=0.65", "optim.weight_decay=0.05"])
    groups = parameter_groups(Classify(model, recipe.classifier, seed=0), recipe.optim)
    ours = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for p in group["params"]:
            ours[names[id(p)].removeprefix("encoder.")] = (group["lr_scale"], group["weight_decay"])
    theirs = {}
    names = {id(p): name.replace("patch_embed.proj", "patch_embed") for name, p in peer.named_parameters()}
    for group in param_groups_layer_decay(
        peer, weight_decay=0.05, no_weight_decay_list=peer.no_weight_decay(), layer_decay=0.65
    ):
        for p in group["params"]:
            theirs[names[id(p)]] = (group["lr_scale"], group["weight_decay"])
    assert ours == theirs
    assert ours["blocks.11.mlp.fc1.weight"] == (0.65, 0.05)
    assert ours["pos_embed"] == (0.65**13, 0.0)
    assert ours["head.bias"] == (1.0, 0.0)


def batch(objective: Classify, positions: np.ndarray, step: int = 3) -> Batch:
    everything = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(step))
    labels = torch.arange(12) % 10
    n, drawn = len(positions), objective.draw(step, positions)
    return Batch(everything[positions], labels[positions], positions, positions, np.ones(n, bool), step, 0, drawn=drawn)


def test_what_the_objective_is_given_depends_on_the_position_in_the_global_batch_alone():
    overrides = ["model.drop_path=0.5", "classifier.mixup=0.8", "classifier.cutmix=1.0"]
    section = load_recipe("finetune/demo", overrides).classifier
    objective = Classify(build(drop_path=0.5), section, seed=0)
    whole = objective.tensors(batch(objective, np.arange(12)), torch.device("cpu"))
    for part in (np.arange(0, 6), np.arange(6, 12), np.arange(2, 4)):
        mine = objective.tensors(batch(objective, part), torch.device("cpu"))
        assert all(torch.equal(a, b[part]) for a, b in zip(mine, whole, strict=True))
    other = objective.tensors(batch(objective, np.arange(12), step=4), torch.device("cpu"))
    assert not any(torch.equal(a, b) for a, b in zip(other, whole, strict=True))


def test_what_is_frozen_drops_no_path():
    section = load_recipe("finetune/demo").classifier
    objective = Classify(build(drop_path=0.9, trained_blocks=1.5), section, seed=0)
    *_, scales = objective.tensors(batch(objective, np.arange(12)), torch.device("cpu"))
    assert (scales[:, :2] == 1).all()
    assert (scales[:, 2, 0] == 1).all()
    assert (scales[:, 2, 1] != 1).all()
    assert (scales[:, 3] != 1).all()
