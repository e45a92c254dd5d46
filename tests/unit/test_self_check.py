"""The checks a run makes of itself: what each finds, and that it finds nothing in runs as they should be."""

import json
import math

import numpy as np
import pytest

from mae_scale.config.load import load_recipe, packaged_recipes
from mae_scale.training.reference_curves import curve_file
from mae_scale.training.self_check import CHECKS, Course, Untrained

PER_EPOCH, WARMUP_EPOCHS, EPOCHS = 40, 5, 100


def course(untrained: float | None = 1.0, tolerance: float = 0.02, *, learns_steadily=True, **changed) -> Course:
    known = None if untrained is None else Untrained(untrained, "the loss of none", tolerance)
    settings = {
        "steps_per_epoch": PER_EPOCH,
        "warmup_steps": WARMUP_EPOCHS * PER_EPOCH,
        "total_steps": EPOCHS * PER_EPOCH,
        "learns_steadily": learns_steadily,
        "untrained": lambda: known,
    }
    return Course(**settings | changed)


def rows(loss_at, epochs: float = EPOCHS, *, norm_at=lambda epoch: 1.0, wait=0.01) -> list[dict]:
    """A row every ten steps, with 2 % of noise on the loss and 30 % on the norm."""
    random = np.random.default_rng(0)
    return [
        {
            "step": step,
            "train/loss": loss_at(step / PER_EPOCH) * (1 + 0.02 * random.standard_normal()),
            "train/grad_norm": norm_at(step / PER_EPOCH) * math.exp(0.3 * random.standard_normal()),
            "perf/step_time_s": 1.0,
            "perf/data_wait_s": wait,
        }
        for step in range(10, int(epochs * PER_EPOCH) + 1, 10)
    ]


def first_warning(kind: str, found: list[dict], about: Course) -> tuple[float, str] | None:
    """(epoch, text) of the first row at which a check warns, row by row as a run does."""
    for count in range(1, len(found) + 1):
        if text := CHECKS[kind](found[:count], about):
            return found[count - 1]["step"] / PER_EPOCH, text
    return None


def usual(epoch: float) -> float:
    return 0.4 + 0.6 * math.exp(-epoch / 10)


@pytest.mark.parametrize("kind", CHECKS)
def test_a_run_as_it_should_be_is_given_no_warning(kind):
    falling = rows(usual, norm_at=lambda epoch: 5 * math.exp(-epoch / 3) + 0.5)
    assert first_warning(kind, falling, course()) is None


def test_a_classifier_that_never_beats_guessing_is_told_so_an_epoch_after_the_warm_up():
    climbing = rows(lambda epoch: 2.3 + epoch / 5, epochs=20)
    epoch, text = first_warning("untrained_loss", climbing, course(math.log(10), tolerance=0, learns_steadily=False))
    assert epoch == WARMUP_EPOCHS + 1
    assert "above the loss of none = 2.303" in text
    assert "optim.base_lr" in text


def test_pre_training_that_predicts_the_mean_is_told_so():
    epoch, text = first_warning("untrained_loss", rows(lambda epoch: 0.99, epochs=20), course())
    assert epoch == WARMUP_EPOCHS + 1
    assert "close to the loss of none = 1" in text


def test_without_a_known_loss_of_an_untrained_model_nothing_is_said_of_it():
    assert first_warning("untrained_loss", rows(lambda epoch: 5.0, epochs=20), course(None)) is None


def test_a_loss_that_rises_for_long_is_told_and_a_short_hump_is_not():
    def hump(epoch: float, length: float) -> float:
        return usual(epoch) + (0.1 if 30 < epoch < 30 + length else 0)

    assert first_warning("rising_loss", rows(lambda epoch: hump(epoch, 7)), course()) is None
    epoch, text = first_warning("rising_loss", rows(lambda epoch: hump(epoch, 60)), course())
    assert 40 < epoch < 46  # five windows of ten rows, which are 2.5 epochs
    assert text.startswith("train/loss has been higher for 12.5 epochs than it was before")
    assert first_warning("rising_loss", rows(lambda epoch: hump(epoch, 60)), course(learns_steadily=False)) is None


def test_a_loss_below_zero_is_told_of_as_one_above():
    falls = rows(lambda epoch: usual(epoch) - 5)
    for kind in CHECKS:
        assert first_warning(kind, falls, course(-3.0)) is None
    rises = rows(lambda epoch: usual(epoch) - 5 + (1 if epoch > 30 else 0))
    assert first_warning("rising_loss", rises, course()) is not None
    assert first_warning("loss_spike", rises, course()) is not None
    assert first_warning("untrained_loss", rows(lambda epoch: -0.97, epochs=20), course(-1.0, 0.05)) is not None


def test_a_jump_of_the_loss_above_all_of_late_is_told_and_a_single_row_or_noise_is_not():
    def jump(epoch: float) -> float:
        return usual(epoch) + (0.2 if 30 < epoch < 31.5 else 0)

    single = rows(usual)
    single[200]["train/loss"] = 2.0
    assert first_warning("loss_spike", single, course()) is None
    assert first_warning("loss_spike", rows(lambda epoch: 0.5), course()) is None  # 2 % of noise
    epoch, text = first_warning("loss_spike", rows(jump), course())
    assert 30.5 <= epoch <= 31.5
    assert "or more in 3 logged steps, and was at most 0.5" in text
    assert first_warning("loss_spike", rows(jump), course(learns_steadily=False)) is None
    assert first_warning("loss_spike", rows(jump), course(warmup_steps=40 * PER_EPOCH)) is None


def test_gradients_ten_times_as_large_are_told_and_a_single_one_is_not():
    found = rows(usual)
    found[200]["train/grad_norm"] = 1000.0
    found[210]["train/grad_norm"] = math.inf
    assert first_warning("strange_gradients", found, course()) is None
    epoch, text = first_warning("strange_gradients", rows(usual, norm_at=lambda e: 1 if e < 30 else 30), course())
    assert 30 <= epoch < 32
    assert "its median before; optim.clip_grad_norm" in text


def test_waiting_for_images_is_told_after_a_hundred_steps_and_not_of_the_first_ones():
    slow_start = rows(usual)
    for row in slow_start[:8]:
        row["perf/data_wait_s"] = 0.9
    assert first_warning("data_wait", slow_start, course()) is None
    epoch, text = first_warning("data_wait", rows(usual, wait=0.25), course())
    assert 2.5 < epoch <= 5
    assert text.startswith("25% of each step is spent waiting for images (perf/data_wait_s); more data.threads")


def test_losses_that_are_not_finite_are_no_loss():
    found = rows(usual)
    for row in found[100:130]:
        row["train/loss"] = math.nan
    for kind in CHECKS:
        assert first_warning(kind, found, course()) is None


@pytest.mark.parametrize("name", [name for name in packaged_recipes() if curve_file(name).exists()])
def test_no_reference_curve_raises_an_alarm(name):
    recipe, content = load_recipe(name), json.loads(curve_file(name).read_text())
    curve, schedule = content["curve"], recipe.schedule
    assert len(curve["train/loss"]) == schedule.epochs
    found = [
        {
            "step": 10 * epoch,
            "train/loss": loss,
            "train/grad_norm": norm,
            "perf/step_time_s": 1.0,
            "perf/data_wait_s": 0,
        }
        for epoch, (loss, norm) in enumerate(zip(curve["train/loss"], curve["train/grad_norm"], strict=True), start=1)
    ]
    of_tasks = {"mae": (0.9, True), "dvae": (-0.001, True), "detection": (None, False), "segmentation": (None, False)}
    untrained, steadily = of_tasks.get(recipe.task, (math.log(10), False))
    about = course(
        untrained,
        0,
        learns_steadily=steadily,
        steps_per_epoch=10,
        warmup_steps=10 * schedule.warmup_epochs,
        total_steps=10 * schedule.epochs,
    )
    for kind in CHECKS:
        assert first_warning(kind, found, about) is None


def test_every_packaged_demo_has_a_reference_curve():
    demos = {name for name in packaged_recipes() if name.endswith("demo")}
    assert {name for name in packaged_recipes() if curve_file(name).exists()} >= demos
