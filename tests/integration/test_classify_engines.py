"""Every way of scaling trains a classifier as a plain one-process torch loop does: two ranks, 20 steps."""

from pathlib import Path

import numpy as np
import pytest

from tests.integration.classify_worker import EMA, plain_loop
from tests.integration.ranks import OnDemand, fully_sharded_configs, quick, run_worker

pytestmark = pytest.mark.timeout(900)  # the first test waits for all cases of two ranks

WORKER = Path(__file__).with_name("classify_worker.py")
MIDDLE, LAST = 10, 20
STEPS = {"fp32": LAST, "bf16": MIDDLE}
TWO_MICRO_BATCHES = "engine.micro_batch=6"
ENGINES = {
    "ZeRO 0": ["engine.zero_stage=0"],
    "ZeRO 1": ["engine.zero_stage=1"],
    "ZeRO 2, accumulation 2": ["engine.zero_stage=2", TWO_MICRO_BATCHES],
    "FairScale OSS, accumulation 2": ["engine.backend=fairscale", "engine.zero_stage=1", TWO_MICRO_BATCHES],
    "ZeRO 3, accumulation 2": ["engine.config={zero3}", TWO_MICRO_BATCHES],
    "ZeRO 3 as packaged": ["engine.zero_stage=3"],
}
QUICK = ["ZeRO 1"]
DEEPSPEED = [engine for engine in ENGINES if "FairScale" not in engine]
SHARE = {  # what is trained: recipe and overrides, and the number of parameters that are not
    "full": ("finetune/demo", ["optim.layer_decay=0.75"], 0),
    "last MLP": ("partial/demo", ["classifier.trained_blocks=0.5"], 4 + 2 * 12 + 6),
    "last block": ("partial/demo", ["classifier.trained_blocks=1"], 4 + 2 * 12),
}
PROBE = ("probe/demo", ["classifier.pool=cls"])
PROBED = {
    "ZeRO 0": ["engine.zero_stage=0"],
    "FairScale OSS": ["engine.backend=fairscale", "engine.zero_stage=1"],
}
FROZEN_IN_BF16 = "last block, ZeRO 3 as packaged"
WITH_AVERAGE = [f"classifier.ema={EMA}"]


def difference(a: list, b: list) -> float:
    """The largest, over as many steps as both have."""
    return max(float(np.abs(np.array(x) - np.array(y)).max()) for x, y in zip(a, b, strict=False))


def all_cases() -> dict[str, dict]:
    cases = {}

    def add(name: str, recipe: str, overrides: list[str], precision: str, **more) -> None:
        settings = [*overrides, f"engine.precision={precision}"]
        last = STEPS[precision]
        cases[f"{name}, {precision}"] = {"recipe": recipe, "overrides": settings, "first": 0, "last": last, **more}

    for engine, settings in ENGINES.items():
        averaged = WITH_AVERAGE if engine in DEEPSPEED else []
        for precision in STEPS:
            recipe, overrides, _ = SHARE["full"]
            overrides = [*overrides, *settings]
            add(f"full, {engine}", recipe, overrides, precision)
            add(f"watched, {engine}", recipe, [*overrides, *averaged], precision, look_at=[MIDDLE, LAST])
            if averaged:
                add(f"poisoned, {engine}", recipe, [*overrides, *averaged], precision, poison=True)
        for share in ("last MLP", "last block"):
            recipe, overrides, _ = SHARE[share]
            for precision in STEPS if f"{share}, {engine}" == FROZEN_IN_BF16 else ["fp32"]:
                add(f"{share}, {engine}", recipe, [*overrides, *settings], precision, look_at=[MIDDLE, LAST])
    for engine, settings in PROBED.items():
        recipe, overrides = PROBE
        for precision in STEPS:
            add(f"probe, {engine}", recipe, [*overrides, *settings], precision, look_at=[MIDDLE, LAST])
            add(f"poisoned, probe, {engine}", recipe, [*overrides, *settings], precision, poison=True)
    return dict(sorted(cases.items(), key=lambda case: "ZeRO 3" in case[0]))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify_engines")
    files, cases = fully_sharded_configs(folder), all_cases()
    for case in cases.values():
        case["overrides"] = [o.format(**files) for o in case["overrides"]]
    return OnDemand(cases, lambda some: run_worker(WORKER, some, 2, folder), engine_of)


def engine_of(case: str) -> tuple[bool, str]:
    """The cases of one engine are run together, linear probing by itself."""
    return "probe" in case, next(engine for engine in (*ENGINES, *PROBED) if f"{engine}, " in f"{case}, ")


@pytest.fixture(scope="module")
def plain():
    """The plain loop, once a kind of training; for probing in bf16 with features of that precision."""
    loops = {
        share: plain_loop(recipe, overrides, [MIDDLE, LAST], LAST) for share, (recipe, overrides, _) in SHARE.items()
    }
    recipe, overrides = PROBE
    for precision in STEPS:
        settings = [*overrides, f"engine.precision={precision}"]
        loops[f"probe, {precision}"] = plain_loop(recipe, settings, [MIDDLE, LAST], STEPS[precision])
    return loops


@pytest.mark.parametrize("engine", quick(ENGINES, QUICK))
@pytest.mark.parametrize("share", SHARE)
def test_losses_on_two_ranks_are_the_plain_loops(share, engine, two_ranks, plain):
    assert difference(two_ranks[f"{share}, {engine}, fp32"]["losses"], plain[share]["losses"]) < 1e-6


def test_the_plain_loops_learn_and_each_share_of_trained_weights_has_its_own_curve(plain):
    curves = [plain[share]["losses"] for share in SHARE]
    for number, losses in enumerate(curves):
        assert np.mean(losses[-5:]) < np.mean(losses[:5])
        assert all(difference(losses, other) > 1e-3 for other in curves[:number])


@pytest.mark.parametrize("engine", quick(ENGINES, QUICK))
def test_bf16_follows_float32(engine, two_ranks, plain):
    assert 0 < difference(two_ranks[f"full, {engine}, bf16"]["losses"], plain["full"]["losses"]) < 2e-3


@pytest.mark.parametrize("precision", STEPS)
@pytest.mark.parametrize("engine", quick(ENGINES, QUICK))
def test_evaluation_and_an_average_of_the_weights_leave_training_bit_for_bit_as_it_is(engine, precision, two_ranks):
    watched = two_ranks[f"watched, {engine}, {precision}"]
    assert watched["losses"] == two_ranks[f"full, {engine}, {precision}"]["losses"]
    assert [look["changed"] for look in watched["looks"].values()] == [False] * (STEPS[precision] // MIDDLE)


@pytest.mark.parametrize("engine", quick(ENGINES, QUICK))
@pytest.mark.parametrize("share", SHARE)
def test_predictions_are_the_plain_models(share, engine, two_ranks, plain):
    name = "watched" if share == "full" else share
    for step, look in two_ranks[f"{name}, {engine}, fp32"]["looks"].items():
        assert difference(look["live"], plain[share]["looks"][step]["live"]) < 1e-6


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 5e-3)])
@pytest.mark.parametrize("engine", quick(DEEPSPEED, QUICK))
def test_the_average_of_the_weights_predicts_as_a_plain_average_does(engine, precision, tolerance, two_ranks, plain):
    for step, look in two_ranks[f"watched, {engine}, {precision}"]["looks"].items():
        expected = plain["full"]["looks"][step]
        assert difference(look["averaged"], expected["averaged"]) < tolerance
        assert difference(expected["live"], expected["averaged"]) > 5e-2  # what is told apart here


@pytest.mark.parametrize(
    "case",
    quick(
        [f"{s}, {e}" for s in ("last MLP", "last block") for e in ENGINES],
        [f"{s}, {e}" for s in ("last MLP", "last block") for e in QUICK],
    ),
)
def test_only_what_is_trained_changes_has_optimiser_state_and_is_stored(case, two_ranks):
    share, _, engine = case.partition(", ")
    frozen = SHARE[share][2]
    for name in [f"{case}, fp32", f"{case}, bf16"] if case == FROZEN_IN_BF16 else [f"{case}, fp32"]:
        result = two_ranks[name]
        assert (result["frozen"], result["moved"]) == (frozen, [])
        weights = {name for name in result["written"] if name.startswith("weight/model.")}
        parts = (
            ("encoder.blocks.2.", "fc_norm.", "head.")
            if share == "last block"
            else ("encoder.blocks.2.norm2.", "encoder.blocks.2.mlp.", "fc_norm.", "head.")
        )
        assert all(name.removeprefix("weight/model.").startswith(parts) for name in weights)
        assert len(weights) == 44 - frozen
        assert result["written"].keys() == {
            f"{kind}/{name.removeprefix('weight/')}" for name in weights for kind in ("weight", "exp_avg", "exp_avg_sq")
        }
        assert result["held"] == sorted(result["written"])
        trained = sum(count for name, count in result["written"].items() if name in weights)
        every_rank_has_all = engine == "ZeRO 0"
        assert 0 <= sum(result["kept"]) - 2 * trained * (1 + every_rank_has_all) < 100  # shards are filled up


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-3)])
@pytest.mark.parametrize("engine", PROBED)
def test_linear_probing_with_lars_is_the_plain_loop(engine, precision, tolerance, two_ranks, plain):
    result, expected = two_ranks[f"probe, {engine}, {precision}"], plain["probe, fp32"]
    assert difference(result["losses"], expected["losses"]) < tolerance
    for step, look in result["looks"].items():
        assert difference(look["live"], expected["looks"][step]["live"]) < 10 * tolerance
    assert (result["frozen"], result["moved"]) == (42, [])
    assert result["written"] == {
        **{f"{kind}/model.head.weight": 320 for kind in ("weight", "momentum_buffer")},
        **{f"{kind}/model.head.bias": 10 for kind in ("weight", "momentum_buffer")},
        **{f"buffer/model.batch_norm.running_{kind}": 32 for kind in ("mean", "var")},
    }
    assert sum(result["kept"]) == 330 * (2 if engine == "ZeRO 0" else 1)


@pytest.mark.parametrize("precision", STEPS)
@pytest.mark.parametrize("engine", PROBED)
def test_batch_statistics_are_those_of_the_global_batch_in_float32(engine, precision, two_ranks, plain):
    """In bf16 too: beside torch's BatchNorm of the same bf16 features, where those are the same."""
    result = two_ranks[f"probe, {engine}, {precision}"]
    autocast = engine == "FairScale OSS" and precision == "bf16"  # its features are others, by rounding
    for name, values in plain[f"probe, {precision}"]["statistics"].items():
        assert difference(result["statistics"][name], values) < (2e-2 if autocast else 1e-6)
    assert result["statistics_dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("precision", STEPS)
@pytest.mark.parametrize(
    "case", quick([*DEEPSPEED, *(f"probe, {e}" for e in PROBED)], [*QUICK, *(f"probe, {e}" for e in PROBED)])
)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(case, precision, two_ranks):
    """Not the weights, not their average, not the momentum, not BatchNorm's statistics."""
    held = ["buffer", "momentum_buffer"] if "probe" in case else ["ema", "exp_avg", "exp_avg_sq"]
    good, poisoned, after = two_ranks[f"poisoned, {case}, {precision}"]
    assert good == after == {"skipped": False, "changed": [*held, "weight"]}
    assert poisoned == {"skipped": True, "changed": []}
