"""Resuming a classifier: bit for bit on the same ranks, and the same curve on others, whatever part is trained."""

from pathlib import Path

import numpy as np
import pytest

from tests.integration.classify_worker import EMA
from tests.integration.ranks import OnDemand, fully_sharded_configs, quick, run_worker

pytestmark = pytest.mark.timeout(900)  # the first test waits for all cases of two ranks

WORKER = Path(__file__).with_name("classify_worker.py")
SAVED, MIDDLE, LAST = 5, 10, 20
KINDS = {
    "average": ("finetune/demo", [f"classifier.ema={EMA}"]),
    "last block": ("partial/demo", []),
    "probe": ("probe/demo", ["classifier.pool=cls"]),
}
ENGINES = {
    "ZeRO 0": ["engine.zero_stage=0"],
    "ZeRO 1": ["engine.zero_stage=1"],
    "ZeRO 2": ["engine.zero_stage=2"],
    "FairScale OSS": ["engine.backend=fairscale", "engine.zero_stage=1"],
    "ZeRO 3": ["engine.config={zero3}"],
    "ZeRO 3 as packaged": ["engine.zero_stage=3"],
}
# What is saved on two ranks, and on what other ranks and engines it goes on.
MOVES = {
    "average, ZeRO 0": [(3, "ZeRO 1")],
    "average, ZeRO 1": [(1, "ZeRO 3"), (3, "ZeRO 2")],
    "average, ZeRO 3": [(1, "ZeRO 0"), (3, "ZeRO 3")],
    "average, ZeRO 3 as packaged": [(1, "ZeRO 2")],
    "last block, ZeRO 2": [(1, "FairScale OSS"), (3, "ZeRO 3")],
    "last block, FairScale OSS": [(1, "ZeRO 1"), (3, "FairScale OSS")],
    "last block, ZeRO 3": [(1, "ZeRO 2"), (3, "ZeRO 3 as packaged")],
    "probe, ZeRO 0": [(1, "ZeRO 0"), (3, "FairScale OSS")],  # more ranks than parameters: one has nothing
    "probe, FairScale OSS": [(1, "FairScale OSS"), (3, "ZeRO 0")],
}
BF16 = ("average, ZeRO 1", "average, ZeRO 3", "probe, ZeRO 0")
RUNS = [f"{run}, fp32" for run in MOVES] + [f"{run}, bf16" for run in BF16]

QUICK = ["average, ZeRO 3, fp32", "probe, ZeRO 0, fp32"]
ALL_MOVES = quick(
    [(run, ranks, target) for run, moves in MOVES.items() for ranks, target in moves],
    [
        ("average, ZeRO 3", 1, "ZeRO 0"),
        ("probe, ZeRO 0", 3, "FairScale OSS"),
    ],
)


@pytest.fixture(scope="module")
def run_cases(tmp_path_factory):
    """Run {name: (kind, engine, precision, the rest of the case)} on some ranks."""
    folder = tmp_path_factory.mktemp("classify_elastic")
    files = fully_sharded_configs(folder)

    def run(cases: dict, nproc: int) -> dict:
        filled = {}
        for name, (kind, engine, precision, case) in cases.items():
            recipe, overrides = KINDS[kind]
            settings = [*overrides, *ENGINES[engine], f"engine.precision={precision}"]
            places = {key: str(folder / case[key]) for key in ("load", "save") if key in case}
            filled[name] = {"recipe": recipe, "overrides": [o.format(**files) for o in settings], **case, **places}
        return run_worker(WORKER, filled, nproc, folder)

    return run


@pytest.fixture(scope="module")
def two_ranks(run_cases):
    """The whole curve, and the curve with a save and a new start; an engine that has gone on is also sent back."""
    cases = {}
    for name in RUNS:
        run, first = name.split(", "), {"first": SAVED, "last": MIDDLE, "look_at": [MIDDLE], "load": name}
        last = LAST if run[2] == "fp32" else MIDDLE
        cases[f"{name}, whole"] = (*run, {"first": 0, "last": last, "look_at": [MIDDLE, LAST]})
        cases[f"{name}, before"] = (*run, {"first": 0, "last": SAVED, "save": name})
        cases[f"{name}, after"] = (*run, first)
        cases[f"{name}, back"] = (*run, {**first, "stray": True})
    return OnDemand(cases, lambda some: run_cases(some, 2), lambda case: case.rpartition(", ")[0])


@pytest.mark.parametrize("run", quick(RUNS, QUICK))
def test_resume_on_the_same_ranks_is_bit_exact_with_predictions_and_their_average(run, two_ranks):
    whole, before, after = (two_ranks[f"{run}, {part}"] for part in ("whole", "before", "after"))
    assert before["losses"] == whole["losses"][:SAVED]
    assert after["losses"] == whole["losses"][SAVED:MIDDLE]
    assert after["looks"][str(MIDDLE)] == whole["looks"][str(MIDDLE)]


@pytest.mark.parametrize("run", quick(RUNS, QUICK))
def test_going_back_after_a_bad_step_and_an_evaluation_is_bit_exact(run, two_ranks):
    whole, back = (two_ranks[f"{run}, {part}"] for part in ("whole", "back"))
    assert back["losses"] == whole["losses"][SAVED:MIDDLE]
    assert back["looks"][str(MIDDLE)] == whole["looks"][str(MIDDLE)]


@pytest.fixture(scope="module")
def moved(run_cases, two_ranks):
    """Fifteen steps on other ranks and engines from what two ranks have saved: (run, ranks, to) -> result."""

    def go_on(run: str, ranks: int, target: str) -> dict:
        assert two_ranks[f"{run}, fp32, before"]  # has been run, and saved
        case = {"first": SAVED, "last": LAST, "look_at": [LAST], "load": f"{run}, fp32"}
        return run_cases({"moved": (run.split(", ")[0], target, "fp32", case)}, ranks)["moved"]

    return go_on


@pytest.mark.parametrize(("run", "ranks", "target"), ALL_MOVES)
def test_resume_on_other_ranks_and_engines_follows_the_uninterrupted_run(run, ranks, target, two_ranks, moved):
    whole, resumed = two_ranks[f"{run}, fp32, whole"], moved(run, ranks, target)
    assert np.abs(np.subtract(whole["losses"][SAVED:], resumed["losses"])).max() < 1e-6
    for kind in ("live", "averaged"):
        expected, found = (np.array(result["looks"][str(LAST)][kind]) for result in (whole, resumed))
        assert np.abs(expected - found).max() < 1e-6
