"""Resuming: bit for bit on the same ranks, and the same curve on others, for every engine, stage and precision."""

from pathlib import Path

import pytest

from tests.integration.ranks import OnDemand, fully_sharded_configs, quick, run_worker

pytestmark = pytest.mark.timeout(900)  # the first test waits for all cases of two ranks

WORKER = Path(__file__).with_name("elastic_worker.py")
MIDDLE, LAST = 5, 25
TWO_MICRO_BATCHES = {1: "engine.micro_batch=12", 2: "engine.micro_batch=6", 3: "engine.micro_batch=4"}
ENGINES = {
    "ZeRO 0": ["engine.zero_stage=0"],
    "ZeRO 1": ["engine.zero_stage=1"],
    "ZeRO 2": ["engine.zero_stage=2"],
    "ZeRO 3": ["engine.config={zero3}"],
    "ZeRO 3 as packaged": ["engine.zero_stage=3"],
    "ZeRO 3 offload": ["engine.config={zero3_offload}"],
    "FairScale OSS": ["engine.backend=fairscale", "engine.zero_stage=1"],
}
BF16 = "engine.precision=bf16"
# From each engine on two ranks to another number of ranks, and most of them to another engine too.
MOVES = {
    "ZeRO 0": [(1, "ZeRO 3"), (3, "ZeRO 0")],
    "ZeRO 1": [(1, "ZeRO 1"), (3, "FairScale OSS")],
    "ZeRO 2": [(1, "ZeRO 2"), (3, "ZeRO 3"), (3, "ZeRO 2")],
    "ZeRO 3": [(1, "ZeRO 3"), (3, "ZeRO 3"), (1, "ZeRO 2")],
    "ZeRO 3 as packaged": [(3, "ZeRO 3 as packaged")],
    "ZeRO 3 offload": [(1, "ZeRO 0"), (3, "ZeRO 3 offload")],
    "FairScale OSS": [(1, "ZeRO 2"), (3, "FairScale OSS")],
}


SAME = quick(
    [(engine, precision) for engine in ENGINES for precision in ("fp32", "bf16")],
    [("ZeRO 2", "fp32"), ("ZeRO 3", "bf16"), ("FairScale OSS", "fp32")],
)
ALL_MOVES = quick(
    [(source, ranks, target) for source, moves in MOVES.items() for ranks, target in moves],
    [("ZeRO 2", 3, "ZeRO 3"), ("FairScale OSS", 1, "ZeRO 2")],
)


@pytest.fixture(scope="module")
def run_cases(tmp_path_factory):
    """Run cases on some ranks; {case: losses}."""
    folder = tmp_path_factory.mktemp("elastic")
    files = fully_sharded_configs(folder)

    def run(cases: dict, nproc: int) -> dict:
        for case in cases.values():
            case["overrides"] = [o.format(**files) for o in (*case["overrides"], TWO_MICRO_BATCHES[nproc])]
            for key in ("load", "save"):
                case[key] = case.get(key) and str(folder / case[key])
        return run_worker(WORKER, cases, nproc, folder)

    return run


@pytest.fixture(scope="module")
def two_ranks(run_cases):
    """On two ranks, for every engine and precision: the whole curve, and the curve with a save and a new start."""
    cases = {}
    for engine, overrides in ENGINES.items():
        for precision, more in (("fp32", []), ("bf16", [BF16])):
            case, settings = f"{engine}, {precision}", [*overrides, *more]
            last = LAST if precision == "fp32" else 2 * MIDDLE
            cases[f"{case}, whole"] = {"overrides": settings, "first": 0, "last": last}
            cases[f"{case}, before"] = {"overrides": settings, "first": 0, "last": MIDDLE, "save": case}
            cases[f"{case}, poisoned"] = {"overrides": settings, "first": 0, "last": 2, "poison": True}
            cases[f"{case}, after"] = {"overrides": settings, "first": MIDDLE, "last": 2 * MIDDLE, "load": case}
    return OnDemand(cases, lambda some: run_cases(some, 2), lambda case: case.rpartition(", ")[0])


@pytest.mark.parametrize(("engine", "precision"), SAME)
def test_resume_on_the_same_ranks_is_bit_exact(engine, precision, two_ranks):
    whole, before, after = (two_ranks[f"{engine}, {precision}, {part}"] for part in ("whole", "before", "after"))
    assert before == whole[:MIDDLE]
    assert after == whole[MIDDLE : 2 * MIDDLE]


@pytest.mark.parametrize(("engine", "precision"), SAME)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(engine, precision, two_ranks):
    skipped, changed, nan_skipped, nan_changed, one_step = two_ranks[f"{engine}, {precision}, poisoned"]
    assert (skipped, changed) == (False, True)
    assert (nan_skipped, nan_changed, one_step) == (True, False, True)


@pytest.fixture(scope="module")
def moved(run_cases, two_ranks):
    """Twenty steps on other ranks and engines from what two ranks have saved: (from, ranks, to) -> losses."""

    def go_on(source: str, ranks: int, target: str) -> list[float]:
        assert two_ranks[f"{source}, fp32, before"]  # has been run, and saved
        case = {"overrides": ENGINES[target], "first": MIDDLE, "last": LAST, "load": f"{source}, fp32"}
        return run_cases({"moved": case | {"save": f"{source} to {target} on {ranks}"}}, ranks)["moved"]

    return go_on


@pytest.mark.parametrize(("source", "ranks", "target"), ALL_MOVES)
def test_resume_on_other_ranks_and_engines_follows_the_uninterrupted_run(source, ranks, target, two_ranks, moved):
    whole, resumed = two_ranks[f"{source}, fp32, whole"][MIDDLE:], moved(source, ranks, target)
    assert max(abs(a - b) for a, b in zip(whole, resumed, strict=True)) < 1e-6


@pytest.mark.slow
def test_two_to_three_to_one_rank_follows_the_uninterrupted_run(run_cases, two_ranks):
    whole = two_ranks["ZeRO 2, fp32, whole"][MIDDLE:]
    steps = {"first": MIDDLE, "last": MIDDLE + 10}
    on_three = {"overrides": ENGINES["ZeRO 3"], **steps, "load": "ZeRO 2, fp32", "save": "three"}
    losses = run_cases({"three": on_three}, 3)["three"]
    on_one = {"overrides": ENGINES["ZeRO 1"], "first": MIDDLE + 10, "last": LAST, "load": "three"}
    losses += run_cases({"one": on_one}, 1)["one"]
    assert max(abs(a - b) for a, b in zip(whole, losses, strict=True)) < 1e-6
