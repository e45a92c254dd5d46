"""MoCo v3 under every engine: the losses of the paper's algorithm, its momentum encoder, resumed on any ranks."""

from pathlib import Path

import pytest

from tests.integration.moco_worker import plain_loop
from tests.integration.ranks import OnDemand, fully_sharded_configs, run_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORKER = Path(__file__).with_name("moco_worker.py")
ENGINES = {
    "ZeRO 0": ["engine.zero_stage=0"],
    "ZeRO 1": ["engine.zero_stage=1"],
    "ZeRO 2": ["engine.zero_stage=2"],
    "ZeRO 3": ["engine.config={zero3}"],
    "ZeRO 3 as packaged": ["engine.zero_stage=3"],
    "ZeRO 3 offload": ["engine.config={zero3_offload}"],
    "FairScale OSS": ["engine.backend=fairscale", "engine.zero_stage=1"],
    "ZeRO 2, checkpointing all": ["engine.zero_stage=2", "engine.activation_checkpointing=all"],
    "ZeRO 3, checkpointing offload": ["engine.config={zero3}", "engine.activation_checkpointing=offload"],
}
BF16 = {name: [*ENGINES[name], "engine.precision=bf16"] for name in [*[*ENGINES][:5], "FairScale OSS"]}


@pytest.fixture(scope="module")
def run_cases(tmp_path_factory):
    """Run cases on some ranks; returns {case: result}."""
    folder = tmp_path_factory.mktemp("moco")
    files = fully_sharded_configs(folder)

    def run(cases: dict, nproc: int) -> dict:
        for case in cases.values():
            case["overrides"] = [o.format(**files) for o in case["overrides"]]
            for key in ("load", "save"):
                case[key] = case.get(key) and str(folder / case[key])
        return run_worker(WORKER, cases, nproc, folder)

    return run


@pytest.fixture(scope="module")
def plain():
    return plain_loop()


@pytest.fixture(scope="module")
def two_ranks(run_cases):
    cases = {name: {"overrides": overrides} for name, overrides in ENGINES.items()}
    return OnDemand(cases, lambda cases: run_cases(cases, 2), lambda case: None)


def largest_difference(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b)
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_give_the_losses_of_the_papers_algorithm(engine, two_ranks, plain):
    found = two_ranks[engine]
    assert largest_difference(found["losses"], plain["losses"]) < 1e-5
    assert found["averages"] == pytest.approx(plain["averages"], rel=1e-5)
    assert found["copied"] == pytest.approx(found["averages"], rel=1e-9)


def test_one_rank_gives_the_losses_of_the_papers_algorithm(run_cases, plain):
    names = ("ZeRO 0", "ZeRO 2", "ZeRO 3", "FairScale OSS")
    found = run_cases({name: {"overrides": ENGINES[name]} for name in names}, 1)
    for name in names:
        assert largest_difference(found[name]["losses"], plain["losses"]) < 1e-5, name


def test_bf16_follows_float32_and_its_average_stays_float32(run_cases, plain):
    found = run_cases({name: {"overrides": overrides} for name, overrides in BF16.items()}, 2)
    for name, result in found.items():
        # Of hardly trained features BatchNorm makes much of roundings: later losses differ by more.
        assert 0 < largest_difference(result["losses"][:3], plain["losses"][:3]) < 0.1, name
        assert result["kept_dtypes"] == ["torch.float32"], name
        assert result["averages"] == pytest.approx(plain["averages"], rel=2e-3), name
        autocast = name.startswith("FairScale")  # over float32 weights
        assert result["copied_dtypes"] == ["torch.float32" if autocast else "torch.bfloat16"], name
        assert result["copied"] == pytest.approx(result["averages"], rel=1e-9 if autocast else 1e-3), name


def test_compiled_blocks_of_both_encoders_give_the_papers_losses(run_cases, plain):
    overrides = ["engine.zero_stage=2", "engine.compile=true", "engine.activation_checkpointing=all"]
    found = run_cases({"compiled": {"overrides": overrides}}, 2)["compiled"]
    assert found["compiled_frames"] > 0
    assert largest_difference(found["losses"], plain["losses"]) < 1e-5


POISONED = 4


def test_a_step_that_is_skipped_moves_the_average_as_the_formula_says_and_nothing_else(run_cases, two_ranks):
    """As the paper's algorithm: the average moves before the step, towards the weights as they are."""
    names = ("ZeRO 1", "ZeRO 3", "FairScale OSS")
    found = run_cases({name: {"overrides": ENGINES[name], "poison": POISONED} for name in names}, 2)
    for name, result in found.items():
        assert [step for step, skipped in enumerate(result["skipped"]) if skipped] == [POISONED], name
        assert result["losses"][:POISONED] == two_ranks[name]["losses"][:POISONED]
        assert all(loss == loss for loss in result["losses"][POISONED + 1 :]), name
        assert result["averages"] == pytest.approx(two_ranks[name]["averages"], rel=0.05)
    assert found["ZeRO 1"]["averages"] == pytest.approx(found["ZeRO 3"]["averages"], rel=1e-5)
    assert found["ZeRO 1"]["averages"] == pytest.approx(found["FairScale OSS"]["averages"], rel=1e-5)


MIDDLE, LAST = 5, 12
SAVED = ("ZeRO 0", "ZeRO 2", "ZeRO 3", "FairScale OSS")


@pytest.fixture(scope="module")
def saved(run_cases):
    """The first steps of each engine on two ranks, and their checkpoints by the engine's name."""
    cases = {n: {"overrides": ENGINES[n], "first": 0, "last": MIDDLE, "save": n} for n in SAVED}
    return run_cases(cases, 2)


def test_a_run_that_is_resumed_goes_on_bit_for_bit(saved, run_cases, two_ranks):
    later = run_cases({n: {"overrides": ENGINES[n], "first": MIDDLE, "last": LAST, "load": n} for n in SAVED}, 2)
    for name in SAVED:
        assert saved[name]["losses"] + later[name]["losses"] == two_ranks[name]["losses"], name
        assert later[name]["averages"] == two_ranks[name]["averages"], name


MOVES = [
    ("ZeRO 0", 1, "ZeRO 3"),
    ("ZeRO 2", 1, "ZeRO 2"),
    ("ZeRO 3", 3, "FairScale OSS"),
    ("FairScale OSS", 3, "ZeRO 2"),
]


@pytest.mark.parametrize(("source", "ranks", "target"), MOVES)
def test_other_ranks_and_engines_follow_the_uninterrupted_run(source, ranks, target, saved, run_cases, two_ranks):
    case = {"overrides": ENGINES[target], "first": MIDDLE, "last": LAST, "load": source}
    found = run_cases({"moved": case}, ranks)["moved"]
    assert largest_difference(found["losses"], two_ranks[source]["losses"][MIDDLE:]) < 1e-5
    assert found["averages"] == pytest.approx(two_ranks[source]["averages"], rel=1e-6)
