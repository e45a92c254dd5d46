"""A recipe says what a run is, refuses what it does not know, and knows when two recipes are one run."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from math import prod
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe, packaged_recipes
from mae_scale.config.schema import STARTING, differing_keys
from mae_scale.engines.deepspeed_config import deepspeed_config
from mae_scale.engines.policy import layout_of, refuse_wrong_combinations
from mae_scale.models.build import build_beit
from mae_scale.planning.hardware import DEFAULT_LINK
from mae_scale.tasks.plan import asked_of, make_plan
from mae_scale.tasks.registry import task_of
from mae_scale.training.preflight import training_augmentation
from tests.tokenisers import tokeniser_file

IMAGENET = 1_281_167  # training images


def header(name: str) -> str:
    """The comment at the head of a packaged recipe."""
    return resources.files("mae_scale.recipes").joinpath(f"{name}.yaml").read_text().partition("\n\n")[0]


def command_of(name: str) -> str:
    """The command in a recipe's header, on one line."""
    head = header(name)
    return re.sub(r"[\s#\\]+", " ", head[head.index("Command") :])


def ranks_of(command: str) -> int:
    """How many ranks a command starts."""
    return prod(map(int, re.findall(r"--(?:nnodes|nproc-per-node|nproc)[ =](\d+)", command)))


@pytest.mark.parametrize("size", ["base", "large", "huge"])
@pytest.mark.parametrize("epochs", [800, 1600])
def test_packaged_recipes_are_the_papers_settings(size, epochs):
    recipe = load_recipe(f"pretrain/vit_{size}_{epochs}ep")
    assert recipe.model.name.startswith(f"vit_{size}_patch")
    assert recipe.lr == pytest.approx(1.5e-4 * 4096 / 256)
    assert (recipe.optim.betas, recipe.optim.weight_decay, recipe.optim.clip_grad_norm) == ((0.9, 0.95), 0.05, None)
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs, recipe.data.global_batch) == (epochs, 40, 4096)
    assert (recipe.model.mask_ratio, recipe.model.masking, recipe.model.target) == (0.75, "random", "normalised_pixels")
    assert recipe.data.augmentation == "random_resized_crop"


def test_the_autoencoder_of_words_is_that_of_pixels_but_for_its_target():
    """The ablation of targets, in which dVAE tokens reach 85.3 by fine-tuning and 71.6 by linear probing."""
    words, pixels = (load_recipe(f"pretrain/vit_large_{name}800ep") for name in ("tokens_", ""))
    assert differing_keys(pixels, words) == ["model.target: normalised_pixels -> tokens"]
    assert "Expected: fine-tuning top-1 85.3, linear probing 71.6." in header("pretrain/vit_large_tokens_800ep")


# width, LayerScale, target, epochs
BEIT = {
    "base_800ep": (768, 0.1, "tokens", 800),
    "large_800ep": (1024, 1e-5, "tokens", 800),
    "base_pixels_300ep": (768, 0.1, "normalised_pixels", 300),
}


@pytest.mark.parametrize("name", BEIT)
def test_beit_recipes_are_its_papers_and_its_releases_settings(name):
    recipe = load_recipe(f"pretrain/beit_vit_{name}")
    optim, schedule, data, model = recipe.optim, recipe.schedule, recipe.data, recipe.model
    with torch.device("meta"):
        built = build_beit(recipe, 8192)
    assert BEIT[name] == (built.encoder.size.width, model.layer_scale, model.target, schedule.epochs)
    assert (built.removed, built.patches, model.masking, model.drop_path) == (75, 196, "block", 0.1)
    assert (recipe.lr, data.global_batch, schedule.warmup_epochs) == (pytest.approx(1.5e-3), 2048, 10)
    assert (optim.name, optim.betas, optim.weight_decay, optim.clip_grad_norm) == ("adamw", (0.9, 0.98), 0.05, 3.0)
    assert (data.augmentation, data.crop_scale) == ("random_resized_crop_color_jitter", 0.08)


def test_the_tokenisers_recipe_has_the_published_sizes_loss_and_number_of_updates():
    recipe = load_recipe("pretrain/dvae_imagenet_256")
    optim, schedule, data, section = recipe.optim, recipe.schedule, recipe.data, recipe.tokenisation
    updates = schedule.epochs * (IMAGENET // data.global_batch)
    assert updates == pytest.approx(3_000_000, rel=1e-3)
    assert (recipe.model.image_size, section.width, section.words, section.blocks_per_group) == (256, 256, 8192, 2)
    assert (section.temperature, section.kl_weight) == (1 / 16, 6.6)
    assert section.temperature_share * updates == pytest.approx(150_000, rel=1e-3)
    assert section.kl_weight_share * updates == pytest.approx(5_000, rel=1e-3)
    assert (recipe.lr, schedule.warmup_epochs) == (pytest.approx(1e-4), 0)
    assert (optim.name, optim.betas, optim.weight_decay) == ("adamw", (0.9, 0.999), 1e-4)
    assert (data.augmentation, data.flip, data.global_batch) == ("fixed_crop", 0, 512)


# base lr, layer-wise decay, epochs, drop path, warm-up epochs, pooled features, LayerScale
FINETUNING = {
    "vit_base_224": (5e-4, 0.65, 100, 0.1, 5, "mean", None),
    "vit_large_224": (1e-3, 0.75, 50, 0.2, 5, "mean", None),
    "vit_huge_224": (1e-3, 0.75, 50, 0.3, 5, "mean", None),
    "vit_huge_448": (1e-3, 0.75, 50, 0.3, 5, "mean", None),
    "beit_vit_base_224": (1e-3, 0.65, 100, 0.1, 20, "mean", 0.1),
    "beit_vit_large_224": (2.5e-4, 0.75, 50, 0.2, 5, "mean", 1e-5),
    "moco_v3_vit_base": (2.5e-4, 1, 150, 0.1, 5, "cls", None),
    "moco_v3_vit_large": (2.5e-4, 1, 150, 0.1, 5, "cls", None),
}
FINETUNED = [(f"finetune/{name}", None, row) for name, row in FINETUNING.items()]
FINETUNED += [(f"partial/vit_{size}", 4, FINETUNING[f"vit_{size}_224"]) for size in ("base", "large", "huge")]


@pytest.mark.parametrize(("name", "trained_blocks", "row"), FINETUNED)
def test_fine_tuning_recipes_are_the_papers_and_the_releases_settings(name, trained_blocks, row):
    recipe = load_recipe(name)
    optim, schedule, data, classifier = recipe.optim, recipe.schedule, recipe.data, recipe.classifier
    found = (optim.base_lr, optim.layer_decay, schedule.epochs, recipe.model.drop_path, schedule.warmup_epochs)
    assert row == (*found, classifier.pool, recipe.model.layer_scale)
    assert recipe.model.encoder == ("vit" if recipe.model.layer_scale is None else "beit")
    assert recipe.lr == pytest.approx(4 * optim.base_lr)
    assert (optim.name, optim.betas, optim.weight_decay) == ("adamw", (0.9, 0.999), 0.05)
    assert (data.augmentation, data.crop_scale, data.random_erasing) == ("rand_augment", None, 0.25)
    assert (classifier.mixup, classifier.cutmix, classifier.label_smoothing) == (0.8, 1.0, 0.1)
    assert (classifier.trained_blocks, classifier.ema) == (trained_blocks, None)
    assert recipe.model.image_size == (448 if name.endswith("448") else 224)


PROBED = [("vit_base", 90), ("vit_large", 50), ("vit_huge", 50), ("moco_v3_vit_base", 90)]


@pytest.mark.parametrize(("name", "epochs"), PROBED)
def test_probing_recipes_are_the_papers_settings(name, epochs):
    recipe = load_recipe(f"probe/{name}")
    optim, data, classifier = recipe.optim, recipe.data, recipe.classifier
    assert (optim.name, optim.weight_decay, optim.momentum) == ("lars", 0, 0.9)
    assert recipe.lr == pytest.approx(0.1 * 16384 / 256)
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs, data.global_batch) == (epochs, 10, 16384)
    assert (data.augmentation, data.crop_scale, data.random_erasing) == ("random_resized_crop", 0.08, 0)
    assert (classifier.pool, classifier.batch_norm, classifier.trained_blocks) == ("cls", True, 0)
    assert classifier.mixup == classifier.cutmix == classifier.label_smoothing == recipe.model.drop_path == 0


@pytest.mark.parametrize(("size", "epochs", "drop_path"), [("base", 300, 0.1), ("large", 200, 0.2), ("huge", 200, 0.2)])
def test_recipes_from_scratch_are_the_papers_settings(size, epochs, drop_path):
    recipe = load_recipe(f"scratch/vit_{size}")
    optim, data, classifier = recipe.optim, recipe.data, recipe.classifier
    assert (optim.betas, optim.weight_decay, optim.layer_decay) == ((0.9, 0.95), 0.3, 1)
    assert recipe.lr == pytest.approx(1e-4 * 4096 / 256)
    assert (recipe.schedule.epochs, recipe.schedule.warmup_epochs, recipe.model.drop_path) == (epochs, 20, drop_path)
    assert (data.augmentation, data.random_erasing, data.global_batch) == ("rand_augment", 0, 4096)
    assert (classifier.mixup, classifier.cutmix, classifier.label_smoothing) == (0.8, 1.0, 0.1)
    assert (classifier.from_scratch, classifier.ema) == (True, 0.9999)


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_packaged_recipe_has_a_header_with_result_cost_and_command_and_runs_on_the_ranks_that_this_names(
    name, digits, tmp_path
):
    head, command = header(name), command_of(name)
    assert all(word in head for word in ("Expected:", "Cost:", "Command")), name
    recipe = load_recipe(name)
    verb = "probe" if "probe" in name else task_of(recipe, Path()).command
    assert f" {verb} {name} " in command
    starts = recipe.start is not None and not recipe.start.from_scratch
    assert ("--weights" in command) == starts
    if starts:
        annotations = [f"{recipe.task}.{key}=x" for key in getattr(task_of(recipe, Path()), "needed", ())]
        recipe = load_recipe(name, [f"{STARTING[recipe.task]}.weights={tmp_path}", *annotations])
    predicts_words = recipe.model.target == "tokens"
    assert ("tokeniser.weights=" in command) == predicts_words
    if predicts_words:
        recipe = load_recipe(name, [f"tokeniser.weights={tokeniser_file(tmp_path / 'words.safetensors', digits, 16)}"])
    layout = layout_of(recipe, ranks_of(command))
    gpu = "H100" in head
    refuse_wrong_combinations(recipe, gpu=gpu)
    deepspeed_config(recipe, layout, gpu=gpu)
    task = task_of(recipe, Path())
    task.check(layout)
    training_augmentation(recipe)


@pytest.mark.parametrize("name", [name for name in packaged_recipes() if "H100" in header(name)])
def test_the_cost_that_a_header_names_is_that_of_its_images(name):
    """Every training image in every epoch, forward and backward; hours as planned on the GPUs of its command."""
    cost = r"Cost: (\S+) FLOPs of matrix products; about (\S+) H100 hours, planned and not measured\."
    flops, hours = re.search(cost, header(name)).groups()
    recipe = load_recipe(name)
    task = task_of(recipe, Path())
    expected = task.training_flops() * task.planned_images * recipe.schedule.epochs
    assert float(flops) == pytest.approx(expected, rel=0.1)
    ranks = ranks_of(command_of(name))
    shape = {"nodes": max(1, ranks // 8), "gpus_per_node": min(ranks, 8)}
    plan = make_plan(asked_of(name, recipe, **shape, gpu="h100", link=DEFAULT_LINK))
    assert float(hours) == pytest.approx(plan.gpu_hours(plan.as_is), rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.widht=3"], "unknown key 'model.widht'; did you mean 'model.width'?"),
        (["optim.lr=1"], "did you mean 'optim.base_lr'?"),
        (["sede=1"], "did you mean 'seed'?"),
        (["global_batch=1"], "did you mean 'data.global_batch'?"),
        (["model.mask_ratio=1.5"], "model.mask_ratio=1.5: input should be less than 1"),
        (["model.masking=stripes"], "'random', 'block' or 'grid'"),
        (["engine.activation_checkpointing=0"], "at least 1"),
        (["schedule.warmup_epochs=50"], "leaves nothing of schedule.epochs=50"),
        (["data.cache_gib=3"], "bounds data.cache, which is not set; add data.cache=DIR"),
        (["seed"], "not an override"),
        (["seed.deep.key=1"], "seed"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_was_meant(overrides, message):
    with pytest.raises(UsageError, match=r"recipe|override|section") as error:
        load_recipe("demo", overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'pretrain/vit_huge_1600ep'"):
        load_recipe("pretrain/vit_hug_1600ep")


def test_for_a_runs_folder_its_recipe_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("extends: demo\n")
    with pytest.raises(UsageError, match=f"did you mean '{tmp_path}/recipe.yaml'"):
        load_recipe(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "not valid YAML"),
        ("- 1", "holds list"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("extends: {self}", "circle"),
        ("extends: nothing", r"r\.yaml, in `extends`: recipe 'nothing' is neither a file nor"),
        ("model: 3", "model=3"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_and_not_run(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_text(content.replace("{self}", str(path)))
    with pytest.raises(UsageError, match=message):
        load_recipe(str(path))


def test_extends_takes_a_path_relative_to_the_recipe_and_not_to_where_the_command_runs(tmp_path, monkeypatch):
    (tmp_path / "recipes" / "mine").mkdir(parents=True)
    (tmp_path / "recipes" / "base.yaml").write_text("extends: demo\nseed: 7\n")
    top = tmp_path / "recipes" / "mine" / "top.yaml"
    top.write_text("extends: ../base.yaml\nmodel: {depth: 3}\n")
    for folder in (tmp_path, tmp_path / "recipes" / "mine"):
        monkeypatch.chdir(folder)
        recipe = load_recipe(os.path.relpath(top))
        assert (recipe.seed, recipe.model.depth) == (7, 3)
    (tmp_path / "recipes" / "base.yaml").write_text("extends: mine/../mine/top.yaml\n")
    with pytest.raises(UsageError, match="circle"):
        load_recipe(str(top))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("classifier.weights=runs/a #2", "runs/a #2"),
        ("data.root=2024", "2024"),
        ("data.root=a: b", "a: b"),
        ("data.root='a b'", "a b"),
        ("data.root=null", None),
        ("model.name=null", None),
        ("tracking.run_name=1e3", "1e3"),
        ("tracking.uri=off", "off"),
        ("tracking.uri=false", "off"),
    ],
)
def test_a_path_or_a_name_is_taken_as_it_is_written(override, value):
    assert load_recipe("finetune/demo", [override]).flat()[override.partition("=")[0]] == value


def test_a_recipe_extends_another_and_overrides_win(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: pretrain/vit_base_800ep\noptim: {base_lr: 1e-3}\nmodel: {decoder_depth: 4}\n")
    recipe = load_recipe(str(path), ["model.decoder_depth=2", "tracking.uri=off", "engine.precision=null"])
    assert (recipe.optim.base_lr, recipe.optim.weight_decay) == (1e-3, 0.05)
    assert (recipe.model.decoder_depth, recipe.model.name) == (2, "vit_base_patch16")
    assert (recipe.tracking.uri, recipe.engine.precision) == ("off", None)


def test_a_saved_recipe_is_the_same_recipe(tmp_path):
    recipe = load_recipe("demo", ["data.root=/data", "engine.activation_checkpointing=2", "optim.clip_grad_norm=1"])
    recipe.save(tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe


def test_another_rank_reads_a_whole_recipe_while_it_is_saved_again(tmp_path):
    recipe, path = load_recipe("demo"), tmp_path / "recipe.yaml"
    recipe.save(path)
    with ThreadPoolExecutor(1) as other:
        saved = other.submit(lambda: [recipe.save(path) for _ in range(200)])
        while not saved.done():
            assert load_recipe(str(path)) == recipe
    saved.result()
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_keys_that_do_not_change_what_is_computed_may_differ_and_others_are_named():
    free = ["engine.zero_stage=3", "checkpoint.keep=9", "tracking.uri=off", "schedule.stop_after_steps=1"]
    old = load_recipe("demo")
    free += ["data.threads=9", "data.device=cpu", "data.cache=/local", "data.cache_gib=2.5"]
    new = load_recipe("demo", [*free, "engine.micro_batch=1"])
    assert differing_keys(old, new) == []
    assert old.digest() == load_recipe("demo", ["data.root=/a", "data.val_root=b", "data.index=c"]).digest()
    assert old.digest() == new.digest()
    changed = load_recipe("demo", ["seed=1", "optim.base_lr=1"])
    assert differing_keys(old, changed) == ["seed: 0 -> 1", "optim.base_lr: 0.008 -> 1.0"]
    assert old.digest() != changed.digest()
