"""MoCo v3 on one rank: the model's published figures, its BatchNorm and loss, its recipe, its weights and others'."""

import math
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from data_pipeline.errors import UsageError
from mae_scale.checkpoints.export import export_weights
from mae_scale.config.load import load_recipe
from mae_scale.models.build import size_of
from mae_scale.models.classifier import build_classifier
from mae_scale.models.global_batch_norm import TrainedGlobalBatchNorm
from mae_scale.models.moco import build_moco, contrast
from mae_scale.models.vit import parameter_count
from mae_scale.models.weights.classifier import load_classifier
from mae_scale.models.weights.files import read_weights
from mae_scale.tasks.moco.objective import Contrast
from mae_scale.tasks.moco.task import MomentumContrast
from mae_scale.training.schedule import momentum

TINY = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "heads": 2}


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return build_moco(**TINY, hidden=48, dim=16)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_torchs_for_each_view_forward_and_backward(affine):
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(1))
    ours, theirs = TrainedGlobalBatchNorm(5, affine=affine), nn.BatchNorm1d(5, affine=affine)
    if affine:
        with torch.no_grad():
            for own, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
                own.copy_(torch.rand(5))
                other.copy_(own)
    found, expected = ours(x), torch.stack([theirs(view) for view in x])
    torch.testing.assert_close(found, expected)
    parameters = [x, *ours.parameters()], [x, *theirs.parameters()]
    gradients = (
        torch.autograd.grad(((y - target) ** 3).sum(), p) for y, p in zip((found, expected), parameters, strict=True)
    )
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_the_loss_of_equal_similarities_is_4_t_ln_n_and_of_perfect_ones_nearly_nothing():
    same = torch.ones(2, 8, 16)
    assert contrast(same, same, 0.2, 0).item() == pytest.approx(4 * 0.2 * math.log(8))
    apart = torch.eye(8, 16).expand(2, 8, 16)
    others = 7 * math.exp(-1 / 0.2)
    assert contrast(apart, apart, 0.2, 0).item() == pytest.approx(4 * 0.2 * math.log(1 + others), rel=1e-5)


def test_queries_of_one_view_are_compared_with_keys_of_the_other():
    """Keys of a view equal the queries of the other one: of the same one they are unlike."""
    queries = torch.stack([torch.eye(4, 8), torch.eye(4, 8).roll(4, dims=1)])
    assert contrast(queries, queries.flip(0), 0.1, 0) < 0.01 < contrast(queries, queries, 0.1, 0)


def test_the_size_is_the_published_one():
    with torch.device("meta"):
        model = build_moco("vit_base_patch16")
    encoder = 85_798_656  # timm's vit_base_patch16_224 without its head, with its positions
    projection, positions = 768 * 768 + 768, 197 * 768
    assert parameter_count(model.encoder) == encoder - projection - positions
    assert parameter_count(model.projector) == 768 * 4096 + 4096**2 + 4096 * 256 + 4 * 4096
    assert parameter_count(model.predictor) == 2 * 256 * 4096 + 2 * 4096


def test_the_patch_projection_and_the_momentum_encoder_are_not_trained(tiny):
    objective = Contrast(tiny, temperature=0.2)
    names = {name for name, parameter in objective.named_parameters()}
    assert all(parameter.requires_grad for parameter in objective.parameters())
    assert not any("patch_embed" in name for name in names)
    assert objective.followers.keys() == {name for name in names if "predictor" not in name}
    assert not any(parameter.requires_grad for parameter in objective.followers.values())
    objective(*torch.randn(2, 8, 3, 16, 16)).backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert all(parameter.grad is None for parameter in objective.followers.values())


def test_the_momentum_rises_from_its_start_to_1_by_half_a_cosine():
    values = [momentum(step, start=0.99, total=100) for step in range(101)]
    assert (values[0], values[50], values[100]) == (0.99, pytest.approx(0.995), 1)
    assert values == sorted(values)


def test_flops_are_three_passes_of_two_views_and_one_of_the_momentum_encoder():
    recipe = load_recipe("pretrain/moco_v3_vit_base")
    task = MomentumContrast(recipe, Path())
    projection = 196 * 768 * 768
    encoder = projection + 12 * (12 * 197 * 768**2 + 2 * 197**2 * 768)
    projector, predictor = 4096 * (768 + 4096 + 256), 2 * 4096 * 256
    passes = 4 * (encoder + projector) + 3 * predictor - 2 * projection  # the frozen layer has no backward pass
    assert task.training_flops() == 2 * 2 * passes
    work = task.workload(1000)
    assert work.forward_flops + work.backward_flops == task.training_flops()
    assert work.frozen == work.trained - (2 * 256 * 4096 + 2 * 4096)


@pytest.mark.parametrize(("size", "width"), [("small", 384), ("base", 768), ("large", 1024)])
def test_recipes_are_the_papers_settings(size, width):
    recipe = load_recipe(f"pretrain/moco_v3_vit_{size}")
    optim, schedule = recipe.optim, recipe.schedule
    assert size_of(recipe.model).width == width
    assert (optim.name, optim.betas, optim.weight_decay) == ("adamw", (0.9, 0.999), 0.1)
    assert recipe.lr == pytest.approx(1.5e-4 * 4096 / 256)
    assert (schedule.epochs, schedule.warmup_epochs, recipe.data.augmentation) == (300, 40, "moco_v3")
    assert recipe.contrast.model_dump() == {"temperature": 0.2, "momentum": 0.99, "hidden": 4096, "dim": 256}


REFUSED = {
    "accumulation": (["engine.micro_batch=8"], "this layout cuts it into 2 steps. Drop engine.micro_batch"),
    "one view": (["data.augmentation=random_resized_crop"], "makes one view of an image, and task: moco compares two"),
    "erasing": (["data.random_erasing=0.25"], "data.random_erasing=0.25 is not done to views of task: moco; drop it"),
    "drop path": (["model.drop_path=0.1"], "model.drop_path=0.1: task: moco does not drop paths; use 0"),
    "temperature": (["moco.temperature=0"], "moco.temperature=0: input should be greater than 0"),
    "momentum": (["moco.momentum=1"], "moco.momentum=1: input should be less than 1"),
    "unknown key": (["moco.temprature=0.1"], "did you mean 'moco.temperature'?"),
    "layer decay": (["optim.layer_decay=0.75"], "optim.layer_decay belongs to tasks that start from weights"),
    "best loss": (["checkpoint.keep_best=val/loss"], "val/loss is not measured by task: moco"),
    "fully sharded": (["engine.backend=fairscale", "engine.zero_stage=3"], "fully sharded"),
    "patch": (["model.patch_size=5"], "not a multiple"),
    "another encoder": (
        ["model.encoder=beit", "model.layer_scale=0.1"],
        "task: moco does not train model.encoder=beit",
    ),
    "another task": (["task=mae"], "the section moco belongs to task: moco"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_clear_line_and_exit_code_2(case, call, tmp_path):
    overrides, says = REFUSED[case]
    sizes = ["model.name=null", *(f"model.{key}={value}" for key, value in TINY.items()), "data.global_batch=16"]
    words = ["pretrain", "pretrain/moco_v3_vit_base", "--out", tmp_path / "run", *sizes, "engine.precision=fp32"]
    code, _, error = call(*words, f"data.root={tmp_path}", *overrides)
    assert (code, error.count("\n")) == (2, 1), error
    assert says in error
    assert not (tmp_path / "run").exists()


def theirs(**extra) -> dict:
    """A checkpoint of pre-training as the authors' code writes it, of timm's modules."""
    state = {}
    for name in ("base_encoder", "momentum_encoder"):
        encoder = VisionTransformer(16, 4, num_classes=7, global_pool="token", embed_dim=32, depth=2, num_heads=2)
        for key, value in encoder.state_dict().items():
            state[f"module.{name}.{key}"] = torch.randn_like(value)
        state[f"module.{name}.head.1.running_mean"] = torch.zeros(48)
    state["module.predictor.0.weight"] = torch.zeros(48, 16)
    content = {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {"state": {0: {"step": 3}}}}
    return content | extra


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_checkpoint_of_the_authors_starts_a_classifier_with_its_base_encoder(pool, tmp_path):
    content = theirs()
    torch.save(content, tmp_path / "vit-b-300ep.pth.tar")
    classifier = build_classifier(classes=3, **TINY, pool=pool)
    report = load_classifier(classifier, read_weights(tmp_path / "vit-b-300ep.pth.tar"))
    base = {k.removeprefix("module.base_encoder."): v for k, v in content["state_dict"].items() if "base_" in k}
    assert torch.equal(classifier.encoder.pos_embed, base["pos_embed"][0])  # theirs have another order of channels
    assert torch.equal(classifier.encoder.blocks[1].mlp.fc1.weight, base["blocks.1.mlp.fc1.weight"])
    fresh = ("head", "fc_norm") if pool == "mean" else ("head",)
    assert set(report.not_set) == {f"{name}.{part}" for name in fresh for part in ("weight", "bias")}


def test_a_checkpoint_of_their_linear_probing_is_a_classifier(tmp_path):
    encoder = VisionTransformer(16, 4, num_classes=3, global_pool="token", embed_dim=32, depth=2, num_heads=2).eval()
    state = {f"module.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"state_dict": state, "best_acc1": torch.tensor(76.7)}, tmp_path / "linear.pth.tar")
    classifier = build_classifier(classes=3, **TINY, pool="cls").eval()
    load_classifier(classifier, read_weights(tmp_path / "linear.pth.tar"))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    encoder.norm.eps = 1e-6
    for block in encoder.blocks:
        block.norm1.eps = block.norm2.eps = 1e-6
    with torch.no_grad():
        torch.testing.assert_close(classifier(images), encoder(images), rtol=1e-4, atol=1e-4)


def test_code_in_a_checkpoint_is_refused(tmp_path):
    torch.save(theirs(hook=Path), tmp_path / "bad.pth.tar")
    with pytest.raises(UsageError, match="could run code when read"):
        read_weights(tmp_path / "bad.pth.tar")


def test_official_weights_have_the_names_that_the_authors_scripts_load_and_give_the_same_features(tiny, tmp_path):
    export_weights(tiny, tmp_path / "moco.pth", "official")
    state = torch.load(tmp_path / "moco.pth", weights_only=True)["state_dict"]
    encoder = VisionTransformer(16, 4, num_classes=0, global_pool="token", embed_dim=32, depth=2, num_heads=2).eval()
    prefix, head = "module.base_encoder.", "module.base_encoder.head"
    taken = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and not k.startswith(head)}
    encoder.load_state_dict(taken)  # as their main_lincls.py does
    encoder.norm.eps = 1e-6
    for block in encoder.blocks:
        block.norm1.eps = block.norm2.eps = 1e-6
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), tiny.features(images), rtol=1e-4, atol=1e-4)
    assert {f"{head}.{number}.weight" for number in (0, 1, 3, 4, 6)} <= state.keys()
    assert state[f"{head}.6.weight"].shape == (16, 48)
    assert {"module.predictor.0.weight", "module.predictor.1.bias", "module.predictor.3.weight"} <= state.keys()
