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
