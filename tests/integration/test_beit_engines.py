"""BEiT under every engine: the losses of a plain loop, for any ranks and micro-batch, and after a resume on others."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.integration.beit_worker import GLOBAL_BATCH, plain_loop, tiny_objective
from tests.integration.ranks import fully_sharded_configs, run_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORKER = Path(__file__).with_name("beit_worker.py")
MIDDLE, LAST = 5, 10
WORDS = ["model.target=tokens", "tokeniser.weights=unused"]
ZERO_3, OSS = "engine.config={zero3}", ["engine.backend=fairscale", "engine.zero_stage=1"]
CASES = {
    "ZeRO 0": ["engine.zero_stage=0"],
    "ZeRO 1, accumulation": ["engine.zero_stage=1", "engine.micro_batch=4"],
    "ZeRO 2": ["engine.zero_stage=2"],
    "ZeRO 2, checkpointing all": ["engine.zero_stage=2", "engine.activation_checkpointing=all"],
    "ZeRO 2, checkpointing offload": ["engine.zero_stage=2", "engine.activation_checkpointing=offload"],
    "ZeRO 3": [ZERO_3],
    "ZeRO 3, accumulation, checkpointing all": [
        ZERO_3,
        "engine.micro_batch=4",
        "engine.activation_checkpointing=all",
    ],
    "ZeRO 3, checkpointing offload": [ZERO_3, "engine.activation_checkpointing=offload"],
    "FairScale OSS, accumulation": [*OSS, "engine.micro_batch=4"],
    "FairScale OSS, checkpointing offload": [*OSS, "engine.activation_checkpointing=offload"],
}
BF16 = {name: ["engine.precision=bf16", *overrides] for name, overrides in CASES.items() if "check" not in name}
MOVES = [("ZeRO 1, accumulation", 3, [ZERO_3]), ("ZeRO 3", 1, ["engine.zero_stage=2"]), ("ZeRO 2", 3, OSS)]


@pytest.fixture(scope="module")
def run_cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beit")
    files = fully_sharded_configs(folder)

    def run(cases: dict, nproc: int) -> dict:
        whole = {"first": 0, "last": LAST, "load": None, "save": None}
        for name, case in cases.items():
            cases[name] = whole | case | {"overrides": [o.format(**files) for o in case["overrides"]]}
            cases[name] |= {key: str(folder / case[key]) for key in ("load", "save") if case.get(key)}
        return run_worker(WORKER, cases, nproc, folder)

    return run


@pytest.fixture(scope="module")
def two_ranks(run_cases):
    cases = {name: {"overrides": [*WORDS, *overrides]} for name, overrides in CASES.items()}
    cases |= {f"{name}, bf16": {"overrides": [*WORDS, *overrides]} for name, overrides in BF16.items()}
    cases["pixels"] = {"overrides": ["engine.micro_batch=4", "engine.zero_stage=2"]}
    for source in {source for source, _, _ in MOVES}:
        case = {"overrides": [*WORDS, *CASES[source]]}
        cases[f"{source}, before"] = case | {"last": MIDDLE, "save": source}
        cases[f"{source}, after"] = case | {"first": MIDDLE, "load": source}
    return run_cases(cases, 2)


@cache
def plain(*overrides: str) -> list[float]:
    return plain_loop(list(overrides), LAST)


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_losses_are_the_means_over_the_removed_patches_of_the_global_batch(case, two_ranks):
    assert difference(two_ranks[case], plain(*WORDS)) < 1e-6


def test_micro_batches_have_different_numbers_of_removed_patches():
    objective, _ = tiny_objective(WORDS)
    counts = [objective.masks("mask", step, np.arange(GLOBAL_BATCH)).sum(axis=1) for step in range(LAST)]
    differ = [len({int(part.sum()) for part in count.reshape(-1, 4)}) > 1 for count in counts]
    assert sum(differ) > LAST / 2


def test_the_plain_loop_learns():
    assert plain(*WORDS)[-1] < plain(*WORDS)[0]


def test_pixels_too(two_ranks):
    assert difference(two_ranks["pixels"], plain()) < 1e-6


@pytest.mark.parametrize("case", BF16)
def test_bf16_follows_float32(case, two_ranks):
    assert 0 < difference(two_ranks[f"{case}, bf16"], plain(*WORDS)) < 0.03


@pytest.mark.parametrize("source", [source for source, _, _ in MOVES])
def test_resume_on_the_same_ranks_is_bit_exact(source, two_ranks):
    assert two_ranks[f"{source}, before"] + two_ranks[f"{source}, after"] == two_ranks[source]


@pytest.mark.parametrize(("source", "ranks", "target"), MOVES)
def test_resume_on_other_ranks_and_engines_follows_the_uninterrupted_run(source, ranks, target, two_ranks, run_cases):
    case = {"overrides": [*WORDS, *target], "first": MIDDLE, "load": source}
    assert difference(run_cases({"moved": case}, ranks)["moved"], two_ranks[source][MIDDLE:]) < 1e-6


def test_one_rank_compiled_gives_the_same_losses(run_cases):
    cases = {
        "compiled": {"overrides": [*WORDS, "engine.zero_stage=2", "engine.compile=true"]},
        "ZeRO 3": {"overrides": [*WORDS, ZERO_3]},
    }
    for case, losses in run_cases(cases, 1).items():
        assert difference(losses, plain(*WORDS)) < 1e-6, case
