"""Every way of scaling gives the losses of a plain one-process torch loop: two ranks, float32, 20 steps."""

from pathlib import Path

import pytest

from tests.integration.engine_worker import plain_loop
from tests.integration.ranks import OnDemand, fully_sharded_configs, quick, run_worker

pytestmark = pytest.mark.timeout(900)  # the first test waits for all cases of two ranks

WORKER = Path(__file__).with_name("engine_worker.py")
CLIPPED = "optim.clip_grad_norm=0.5"
DROPPING = "model.drop_path=0.3"
CASES = {
    "ZeRO 0": ["engine.zero_stage=0"],
    "ZeRO 1": ["engine.zero_stage=1"],
    "ZeRO 2": ["engine.zero_stage=2"],
    "ZeRO 3": ["engine.config={zero3}"],
    "ZeRO 3 as packaged": ["engine.zero_stage=3"],
    "ZeRO 3 offload": ["engine.config={zero3_offload}"],
    "ZeRO 3 offload as packaged": ["engine.zero_stage=3", "engine.offload=true"],
    "FairScale OSS": ["engine.backend=fairscale", "engine.zero_stage=1"],
    "FairScale OSS, accumulation 4": [
        "engine.backend=fairscale",
        "engine.zero_stage=1",
        "engine.micro_batch=2",
    ],
    **{
        f"ZeRO {stage}, accumulation 4": [f"engine.{config}", "engine.micro_batch=2"]
        for stage, config in {
            0: "zero_stage=0",
            1: "zero_stage=1",
            2: "zero_stage=2",
            3: "config={zero3}",
        }.items()
    },
    **{
        f"ZeRO {stage}, checkpointing {policy}": [
            f"engine.{config}",
            f"engine.activation_checkpointing={policy}",
        ]
        for stage, config in {2: "zero_stage=2", 3: "config={zero3}"}.items()
        for policy in ("all", "2", "offload")
    },
    "FairScale OSS, checkpointing offload": [
        "engine.backend=fairscale",
        "engine.zero_stage=1",
        "engine.activation_checkpointing=offload",
    ],
    "ZeRO 0 clipped": ["engine.zero_stage=0", CLIPPED],
    "ZeRO 2 clipped": ["engine.zero_stage=2", CLIPPED],
    "ZeRO 3 clipped": ["engine.config={zero3}", CLIPPED, "engine.micro_batch=4"],
    "FairScale OSS clipped": ["engine.backend=fairscale", "engine.zero_stage=1", CLIPPED],
    "ZeRO 2, accumulation 4, checkpointing all, drop path": [
        "engine.zero_stage=2",
        "engine.micro_batch=2",
        "engine.activation_checkpointing=all",
        DROPPING,
    ],
    "ZeRO 3, drop path": ["engine.config={zero3}", DROPPING],
    "FairScale OSS, checkpointing offload, drop path": [
        "engine.backend=fairscale",
        "engine.zero_stage=1",
        "engine.activation_checkpointing=offload",
        DROPPING,
    ],
}
# Each engine, and each dangerous combination, once.
QUICK = (
    "ZeRO 0",
    "ZeRO 1",
    "ZeRO 3 as packaged",
    "ZeRO 3 offload",
    "ZeRO 3 clipped",
    "ZeRO 2, checkpointing offload",
    "ZeRO 2, accumulation 4, checkpointing all, drop path",
    "FairScale OSS, accumulation 4",
    "FairScale OSS, checkpointing offload, drop path",
)
ONE_RANK = {name: CASES[name] for name in ("ZeRO 0", "ZeRO 1", "ZeRO 2, accumulation 4", "ZeRO 3", "FairScale OSS")}
BF16 = {f"ZeRO {stage}": [f"engine.zero_stage={stage}", "engine.precision=bf16"] for stage in (0, 1, 2, 3)} | {
    "FairScale OSS": ["engine.backend=fairscale", "engine.zero_stage=1", "engine.precision=bf16"]
}
COMPILED = {
    "ZeRO 2, checkpointing": [
        "engine.zero_stage=2",
        "engine.compile=true",
        "engine.activation_checkpointing=all",
    ],
    "ZeRO 2, checkpointing, drop path": [
        "engine.zero_stage=2",
        "engine.compile=true",
        "engine.activation_checkpointing=all",
        DROPPING,
    ],
}


@pytest.fixture(scope="session")
def run_cases(tmp_path_factory):
    """Run cases on some ranks; returns {case: losses, norms, weights}."""

    def run(cases: dict, nproc: int) -> dict:
        folder = tmp_path_factory.mktemp("engines")
        files = fully_sharded_configs(folder)
        filled = {name: [o.format(**files) for o in overrides] for name, overrides in cases.items()}
        return run_worker(WORKER, filled, nproc, folder)

    return run


@pytest.fixture(scope="session")
def two_ranks(run_cases):
    return OnDemand(CASES, lambda cases: run_cases(cases, 2), lambda case: case)


@pytest.fixture(scope="session")
def plain():
    """The plain loop: the whole global batch at once, torch.optim.AdamW; {clip or DROPPING: losses, norms, weights}."""
    return {clip: plain_loop(clip) for clip in (None, 0.5)} | {DROPPING: plain_loop(overrides=(DROPPING,))}


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def plain_counterpart(overrides: list[str], plain: dict) -> dict:
    return plain[DROPPING if DROPPING in overrides else 0.5 if CLIPPED in overrides else None]


@pytest.mark.parametrize("case", quick(CASES, QUICK))
def test_losses_on_two_ranks_are_the_plain_loops(case, two_ranks, plain):
    reference = plain_counterpart(CASES[case], plain)
    assert largest_difference(two_ranks[case]["losses"], reference["losses"]) < 1e-6
    assert two_ranks[case]["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    # A bias of keys has no gradient but rounding, which AdamW scales up: its sum alone differs by 1e-3.
    assert two_ranks[case]["weights"] == pytest.approx(reference["weights"], abs=2e-3)


def test_the_host_never_waits_for_the_device_in_a_step(two_ranks):
    """DeepSpeed's ZeRO 3 does, and with offload something is always waited for (docs/performance.md)."""
    waits = {case: two_ranks[case]["host_waits"] for case in QUICK if "offload" not in case}
    assert waits == {case: 3 if "ZeRO 3" in case else 0 for case in waits}


def test_the_plain_loop_learns_and_clipping_and_drop_path_change_it(plain):
    losses = plain[None]["losses"]
    assert losses[-1] < losses[0]
    for other in (0.5, DROPPING):
        assert largest_difference(losses, plain[other]["losses"]) > 1e-5


@pytest.mark.slow
def test_losses_on_one_rank_are_the_plain_loops(run_cases, plain):
    results = run_cases(ONE_RANK, 1)
    for case in ONE_RANK:
        assert largest_difference(results[case]["losses"], plain[None]["losses"]) < 1e-6, case


def test_one_rank_without_zero_does_not_copy_its_gradients_into_a_buffer(run_cases, two_ranks):
    one, two = run_cases({"ZeRO 0": CASES["ZeRO 0"]}, 1)["ZeRO 0"], two_ranks["ZeRO 0"]
    assert one["flattened"] < one["parameters"]
    assert two["flattened"] >= two["parameters"]


@pytest.mark.slow
def test_bf16_follows_float32_on_every_engine(run_cases, plain):
    results = run_cases(BF16, 2)
    for case in BF16:
        difference = largest_difference(results[case]["losses"], plain[None]["losses"])
        assert 0 < difference < 0.03, (case, difference)
    waits = {case: found["host_waits"] for case, found in results.items()}
    # Without ZeRO, DeepSpeed reads a number of every parameter: linear probing alone runs so, and trains two.
    assert waits.pop("ZeRO 0") > 0
    assert waits == {"ZeRO 1": 2, "ZeRO 2": 0, "ZeRO 3": 3, "FairScale OSS": 0}


@pytest.mark.slow
def test_compiled_blocks_give_the_plain_losses(run_cases, plain):
    results = run_cases(COMPILED, 2)
    for case in COMPILED:
        assert results[case]["compiled_frames"] > 0, case
        assert largest_difference(results[case]["losses"], plain_counterpart(COMPILED[case], plain)["losses"]) < 1e-6
