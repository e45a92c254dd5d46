"""A recipe says what a run is, refuses what it does not know, and knows when two recipes are one run."""

import pytest

from mae_scale.errors import UsageError
from mae_scale.recipe import differing_keys, load_recipe, packaged_recipes


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


def test_every_packaged_recipe_has_a_header_with_result_cost_and_command():
    from importlib import resources

    for name in packaged_recipes():
        header = resources.files("mae_scale.recipes").joinpath(f"{name}.yaml").read_text().partition("\n\n")[0]
        assert all(word in header for word in ("Expected:", "Cost:", "Command")), name


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: [", "not valid YAML"),
        ("- 1", "holds list"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("extends: {self}", "circle"),
        ("extends: nothing", "neither a file nor"),
        ("model: 3", "model=3"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_and_not_run(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_text(content.replace("{self}", str(path)))
    with pytest.raises(UsageError, match=message):
        load_recipe(str(path))


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


def test_keys_that_do_not_change_what_is_computed_may_differ_and_others_are_named():
    free = ["engine.zero_stage=3", "checkpoint.keep=9", "tracking.uri=off", "schedule.stop_after_steps=1"]
    old = load_recipe("demo")
    new = load_recipe("demo", [*free, "data.threads=9", "data.device=cpu", "engine.micro_batch=1"])
    assert differing_keys(old, new) == []
    assert old.digest() == new.digest()
    changed = load_recipe("demo", ["seed=1", "optim.base_lr=1"])
    assert differing_keys(old, changed) == ["seed: 0 -> 1", "optim.base_lr: 0.008 -> 1.0"]
    assert old.digest() != changed.digest()
