"""Learning rate and step metrics: the pure parts of training."""

import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from mae_scale.config.load import load_recipe
from mae_scale.config.sections import ScheduleSection
from mae_scale.training.context import RunContext
from mae_scale.training.schedule import learning_rate
from mae_scale.training.step_metrics import StepClock

IMAGES = 1_281_167
STEPS_PER_EPOCH = IMAGES // 4096


def test_the_whole_1600_epoch_curve_is_the_papers():
    recipe = load_recipe("pretrain/vit_huge_1600ep")
    options = {"peak_lr": recipe.lr, "steps_per_epoch": STEPS_PER_EPOCH, "schedule": recipe.schedule}
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
    options = {"peak_lr": 1.0, "steps_per_epoch": 7, "schedule": ScheduleSection(epochs=10, warmup_epochs=2)}
    assert learning_rate(1, **options) == pytest.approx(1 / 14)
    assert learning_rate(14, **options) == 1.0
    assert learning_rate(42, **options) == pytest.approx(0.5)
    assert learning_rate(70, **options) == pytest.approx(0, abs=1e-15)
    at_once = ScheduleSection(epochs=1, warmup_epochs=0)
    assert learning_rate(0, peak_lr=1.0, steps_per_epoch=7, schedule=at_once) == 1.0


def test_the_peak_is_at_the_end_of_warm_up():
    schedule = ScheduleSection(epochs=20, warmup_epochs=5)
    rates = [learning_rate(s, peak_lr=2.0, steps_per_epoch=10, schedule=schedule) for s in range(200)]
    assert math.isclose(max(rates), 2.0)
    assert rates.index(max(rates)) == 50


def test_detection_falls_to_a_tenth_at_vitdets_steps():
    """detectron2's, 100 epochs: 184,375 steps of 64, a tenth at 163,889 and at 177,546, after 250 steps of warm-up."""
    recipe = load_recipe("detection/vit_base")
    per_epoch = 117_266 // 64
    rates = [
        learning_rate(step, peak_lr=recipe.lr, steps_per_epoch=per_epoch, schedule=recipe.schedule)
        for step in range(100 * per_epoch)
    ]
    assert recipe.lr == pytest.approx(1e-4)
    assert rates[125] == pytest.approx(0.5e-4, rel=2e-3)
    falls = [step for step in range(251, len(rates)) if rates[step] < rates[step - 1]]
    shares = [step / len(rates) for step in falls]
    assert shares == pytest.approx([163_889 / 184_375, 177_546 / 184_375], abs=1e-3)
    assert (rates[falls[0]], rates[-1]) == pytest.approx((1e-5, 1e-6))


def test_segmentation_falls_along_a_line():
    """mmsegmentation's polynomial of power 1 over 160,000 steps of 16, which warms up over 1,500."""
    recipe = load_recipe("segmentation/vit_base")
    per_epoch = 20_210 // 16
    total = recipe.schedule.epochs * per_epoch
    assert total == pytest.approx(160_000, rel=3e-3)
    for step in (3_000, 80_000, 159_000):
        rate = learning_rate(step, peak_lr=recipe.lr, steps_per_epoch=per_epoch, schedule=recipe.schedule)
        assert rate == pytest.approx(1e-4 * (1 - step / total), rel=0.01)


def context_of(recipe: str, *overrides: str) -> RunContext:
    """The context of a run of a packaged recipe on ImageNet, as far as its schedules ask for it."""
    unused = dict.fromkeys(field.name for field in fields(RunContext))
    return RunContext(**unused | {"recipe": load_recipe(recipe, list(overrides)), "index": range(IMAGES)})


def test_a_run_of_moco_v3_has_the_published_momentum_at_every_step_and_another_task_none():
    """From 0.99 to 1 over the whole schedule: adjust_moco_momentum() of the authors' release."""
    context = context_of("pretrain/moco_v3_vit_base")
    epochs, steps = 300, 300 * STEPS_PER_EPOCH
    assert context.steps.total == steps
    for step in (0, 1, STEPS_PER_EPOCH, steps // 4, steps // 2, steps - 1):
        published = 1.0 - 0.5 * (1.0 + math.cos(math.pi * (step / STEPS_PER_EPOCH) / epochs)) * (1.0 - 0.99)
        assert context.momentum(step) == pytest.approx(published, abs=1e-12)
    assert context.momentum(0) == pytest.approx(0.99, abs=1e-12)
    assert context.momentum(steps // 2) == pytest.approx(0.995, abs=1e-12)
    assert 1 - 1e-9 < context.momentum(steps - 1) < 1
    short = context_of("pretrain/moco_v3_vit_base", "schedule.stop_after_steps=900")
    assert short.momentum(800) == context.momentum(800)
    assert context_of("pretrain/vit_base_800ep").momentum(0) is None


def test_images_that_were_replaced_before_a_save_are_in_the_next_log_line():
    clock = StepClock(64)
    clock.count(SimpleNamespace(replaced=1, cache_hits=3, positions=range(8)))
    clock.restart(5)
    clock.count(SimpleNamespace(replaced=0, cache_hits=4, positions=range(8)))
    assert clock.take_counts() == [1, 7, 16]
    assert clock.take_counts() == [0, 0, 0]
