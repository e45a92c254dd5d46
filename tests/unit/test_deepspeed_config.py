"""The complete DeepSpeed configuration of a recipe."""

import json

import pytest

from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe
from mae_scale.engines.deepspeed_config import checks_gradients, deepspeed_config
from mae_scale.engines.policy import layout_of
from mae_scale.packaged import packaged


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_packaged_deepspeed_files_are_filled_in_completely(stage, precision):
    recipe = load_recipe(
        "demo", [f"engine.zero_stage={stage}", f"engine.precision={precision}", "engine.micro_batch=16"]
    )
    config = deepspeed_config(recipe, layout_of(recipe, 2), gpu=True)
    assert "auto" not in json.dumps(config)
    assert config["zero_optimization"]["stage"] == stage
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")
    assert config["fp16"]["loss_scale"] == 0
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (64, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list"),
        ('{"train_batch_size": 32}', 'train_batch_size=32, the recipe makes it 64; write "auto"'),
        ('{"optimizer": {"type": "Adam"}}', "section 'optimizer'"),
        ('{"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}', "nothing decides"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_recipe_is_refused(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(content)
    recipe = load_recipe("demo", [f"engine.config={path}"])
    with pytest.raises(UsageError) as error:
        deepspeed_config(recipe, layout_of(recipe, 2), gpu=False)
    assert message in str(error.value)


def test_a_missing_deepspeed_file_is_named(tmp_path):
    recipe = load_recipe("demo", [f"engine.config={tmp_path}/no.json"])
    with pytest.raises(UsageError, match=r"no\.json cannot be read"):
        deepspeed_config(recipe, layout_of(recipe, 1), gpu=False)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
def test_no_packaged_deepspeed_file_times_steps_by_waiting_for_the_device(name):
    """DeepSpeed's throughput timer is on by default and waits for the device twice a micro-batch."""
    config = json.loads((packaged("ds_configs") / f"{name}.json").read_text())
    assert config["timers"]["throughput"]["enabled"] is False
    assert config["wall_clock_breakdown"] is False


def test_every_packaged_deepspeed_file_is_known_here():
    files = {f.name for f in packaged("ds_configs").glob("*.json")}
    assert files == {f"{name}.json" for name in ("zero0", "zero1", "zero2", "zero3", "zero3_offload")}


@pytest.mark.parametrize(
    ("overrides", "checked_by_us"),
    [
        (["engine.zero_stage=0", "engine.precision=fp32"], True),
        (["engine.zero_stage=1", "engine.precision=fp32"], True),
        (["engine.zero_stage=2", "engine.precision=fp32"], True),
        (["engine.zero_stage=2", "engine.precision=bf16"], True),
        (["engine.zero_stage=1", "engine.precision=bf16"], False),
        (["engine.zero_stage=2", "engine.precision=fp16"], False),
        (["engine.zero_stage=3", "engine.precision=bf16"], False),
    ],
)
def test_deepspeed_leaves_the_norm_to_us_or_clips_itself_and_never_neither(overrides, checked_by_us):
    recipe = load_recipe("demo", [*overrides, "optim.clip_grad_norm=0.5"])
    config = deepspeed_config(recipe, layout_of(recipe, 2), gpu=True)
    assert checks_gradients(config) == checked_by_us
    assert config["gradient_clipping"] == (0.0 if checked_by_us else 0.5)
    zero = config["zero_optimization"]
    told = checked_by_us and zero["stage"] > 0
    assert zero.get("compute_grad_norm", True) != told
    assert config["bf16"].get("check_grad_overflow", True) != told


def test_communication_overlaps_the_backward_pass_only_where_there_is_some():
    recipe = load_recipe("demo")
    for ranks in (1, 2):
        config = deepspeed_config(recipe, layout_of(recipe, ranks), gpu=False)
        assert config["zero_optimization"]["overlap_comm"] == (ranks > 1)
