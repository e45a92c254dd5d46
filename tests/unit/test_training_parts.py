"""Learning rate, parameter groups, batch layout and DeepSpeed files: the pure parts of training."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe
from mae_scale.engines.deepspeed_build import OLDEST, import_deepspeed
from mae_scale.engines.deepspeed_config import checks_gradients, deepspeed_config
from mae_scale.engines.optimizers import parameter_groups
from mae_scale.engines.policy import compiles, layout_of, refuse_wrong_combinations
from mae_scale.models.mae import build_mae
from mae_scale.packaged import packaged
from mae_scale.tasks.mae.objective import Reconstruct
from mae_scale.training.schedule import learning_rate
from mae_scale.training.step_metrics import StepClock

STEPS_PER_EPOCH = 1_281_167 // 4096


def test_the_whole_1600_epoch_curve_is_the_papers():
    recipe = load_recipe("pretrain/vit_huge_1600ep")
    options = {"peak_lr": recipe.lr, "steps_per_epoch": STEPS_PER_EPOCH, "epochs": 1600, "warmup_epochs": 40}
    steps = range(1600 * STEPS_PER_EPOCH)
    curve = torch.tensor([learning_rate(step, **options) for step in steps], dtype=torch.float64)
    warm = 40 * STEPS_PER_EPOCH
    # timm's scheduler as an independent peer.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    peer = CosineLRScheduler(
        optimizer, t_initial=1560 * STEPS_PER_EPOCH, warmup_t=warm, warmup_prefix=True, t_in_epochs=False
    )
    expected = torch.tensor([peer._get_lr(step)[0] for step in steps], dtype=torch.float64)
    assert torch.allclose(curve, expected, rtol=1e-9, atol=1e-15)
    assert curve[0] == 0
    assert curve.argmax() == warm
    assert curve[-1] < 1e-10


def test_the_rate_is_set_every_step_and_reaches_zero_exactly_after_the_last():
    options = {"peak_lr": 1.0, "steps_per_epoch": 7, "epochs": 10, "warmup_epochs": 2}
    assert learning_rate(1, **options) == pytest.approx(1 / 14)
    assert learning_rate(14, **options) == 1.0
    assert learning_rate(42, **options) == pytest.approx(0.5)
    assert learning_rate(70, **options) == pytest.approx(0, abs=1e-15)
    assert learning_rate(0, peak_lr=1.0, steps_per_epoch=7, epochs=1, warmup_epochs=0) == 1.0


def test_biases_norms_and_tokens_are_not_decayed_and_everything_else_is():
    model = build_mae(
        None,
        image_size=16,
        patch_size=4,
        width=32,
        depth=2,
        heads=2,
        decoder_width=16,
        decoder_depth=1,
        decoder_heads=2,
    )
    decayed, plain = parameter_groups(Reconstruct(model, seed=0), load_recipe("demo").optim)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in plain["params"]} == {
        n for n in names.values() if n.endswith(("bias", "cls_token", "mask_token")) or "norm" in n
    }
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)


def test_the_batch_layout_follows_from_the_global_batch():
    recipe = load_recipe("pretrain/vit_huge_1600ep")
    for ranks, micro_batch, accumulation in ((1, 256, 16), (8, 256, 2), (16, 256, 1), (64, 64, 1), (4096, 1, 1)):
        layout = layout_of(recipe, ranks)
        assert (layout.micro_batch, layout.accumulation) == (micro_batch, accumulation)
        assert layout.world_size * layout.micro_batch * layout.accumulation == 4096


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        ([], 3, "4095 or 4098 would fit, with this batch 1, 2, 4 or 8 ranks"),
        (["engine.micro_batch=48"], 64, "engine.micro_batch=8, 16, 32 or 64 would fit"),
        (["engine.micro_batch=12"], 256, "share of 16 images"),
    ],
)
def test_a_mismatch_says_what_would_fit(overrides, ranks, message):
    with pytest.raises(UsageError) as error:
        layout_of(load_recipe("pretrain/vit_huge_1600ep", overrides), ranks)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "gpu", "reason"),
    [
        (["engine.precision=fp16"], False, "fp16 needs a GPU"),
        (["engine.zero_stage=3", "engine.compile=true"], True, "loses gradients"),
        (["engine.compile=true", "engine.activation_checkpointing=offload"], True, "uncompiled"),
        (["engine.offload=true"], True, "needs engine.zero_stage=3"),
        (["engine.backend=fairscale", "engine.zero_stage=2"], True, "wrong gradients"),
        (["engine.backend=fairscale", "engine.zero_stage=3"], False, "needs a GPU"),
        (["engine.backend=fairscale", "engine.zero_stage=1", "engine.precision=fp16"], True, "bf16"),
        (["engine.backend=fairscale", "engine.zero_stage=1", "engine.offload=true"], True, "offload"),
        (["data.device=gpu"], False, "no GPU is visible"),
    ],
)
def test_what_is_wrong_without_an_error_is_refused_with_the_reason(overrides, gpu, reason):
    with pytest.raises(UsageError, match=reason):
        refuse_wrong_combinations(load_recipe("demo", overrides), gpu=gpu)


def test_compiling_zero_3_is_refused_through_a_file_of_ones_own_too(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(UsageError, match="loses gradients"):
        refuse_wrong_combinations(load_recipe("demo", [f"engine.config={path}", "engine.compile=true"]), gpu=True)
    assert not compiles(load_recipe("demo", [f"engine.config={path}"]), 3, gpu=True)


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


def test_the_peak_is_at_the_end_of_warm_up():
    rates = [learning_rate(s, peak_lr=2.0, steps_per_epoch=10, epochs=20, warmup_epochs=5) for s in range(200)]
    assert math.isclose(max(rates), 2.0)
    assert rates.index(max(rates)) == 50


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


def test_images_that_were_replaced_before_a_save_are_in_the_next_log_line():
    clock = StepClock(64)
    clock.count(SimpleNamespace(replaced=1, cache_hits=3, positions=range(8)))
    clock.restart(5)
    clock.count(SimpleNamespace(replaced=0, cache_hits=4, positions=range(8)))
    assert clock.take_counts() == [1, 7, 16]
    assert clock.take_counts() == [0, 0, 0]


def test_an_old_deepspeed_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("deepspeed.__version__", "0.18.9+abc123")
    with pytest.raises(UsageError, match=r"DeepSpeed 0\.18\.9\+abc123 is installed; 0\.19\.7 or newer is needed"):
        import_deepspeed()


def test_the_oldest_deepspeed_is_the_one_that_is_installed_with_the_package():
    setup = Path(__file__).resolve().parents[2] / "setup.py"
    assert f'"deepspeed>={".".join(map(str, OLDEST))}"' in setup.read_text()
