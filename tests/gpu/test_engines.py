"""Every way of scaling, NCCL with one rank on the GPU, gives the losses of a plain torch loop on the same GPU."""

import pytest

pytest.importorskip("pydantic")

from tests.integration.engine_worker import plain_loop
from tests.integration.test_engines import CLIPPED, largest_difference, run_cases  # noqa: F401

pytestmark = pytest.mark.timeout(600)

FP32, PLAIN = "engine.precision=fp32", "engine.compile=false"
ZERO = {0: "zero_stage=0", 1: "zero_stage=1", 2: "zero_stage=2", 3: "config={zero3}"}
DEEPSPEED = {
    **{f"ZeRO {stage}": [f"engine.{config}", FP32, PLAIN] for stage, config in ZERO.items()},
    **{
        f"ZeRO {stage}, accumulation 4": [f"engine.{config}", FP32, PLAIN, "engine.micro_batch=4"]
        for stage, config in ZERO.items()
    },
    **{
        f"ZeRO {stage}, checkpointing": [
            f"engine.{config}",
            FP32,
            PLAIN,
            "engine.activation_checkpointing=all",
        ]
        for stage, config in ZERO.items()
    },
    "ZeRO 3 offload": ["engine.config={zero3_offload}", FP32, PLAIN],
}
HALF = {
    f"ZeRO {stage}, {precision}": [f"engine.{config}", f"engine.precision={precision}", PLAIN]
    for precision in ("bf16", "fp16")
    for stage, config in ZERO.items()
}
COMPILED = {
    **{f"ZeRO {stage}, compiled": [f"engine.{ZERO[stage]}", FP32, "engine.compile=true"] for stage in (0, 1, 2)},
    "ZeRO 2, compiled, checkpointing": [
        "engine.zero_stage=2",
        FP32,
        "engine.compile=true",
        "engine.activation_checkpointing=all",
    ],
}
OSS = {"FairScale OSS": ["engine.backend=fairscale", "engine.zero_stage=1", FP32, PLAIN]}
OSS_BF16 = {"FairScale OSS": ["engine.backend=fairscale", "engine.zero_stage=1", "engine.precision=bf16", PLAIN]}
SHARDED = {
    "FairScale fully sharded": ["engine.backend=fairscale", "engine.zero_stage=3", FP32, PLAIN],
    "FairScale fully sharded, checkpointing": [
        "engine.backend=fairscale",
        "engine.zero_stage=3",
        FP32,
        PLAIN,
        "engine.activation_checkpointing=all",
    ],
}


@pytest.fixture(scope="module")
def plain():
    return plain_loop(device="cuda")


def check(results, plain, tolerance):
    differences = {case: largest_difference(found["losses"], plain["losses"]) for case, found in results.items()}
    assert max(differences.values()) < tolerance, differences
    for case, found in results.items():
        assert found["norms"] == pytest.approx(plain["norms"], rel=1e-3), case
        assert found["weights"] == pytest.approx(plain["weights"], abs=1e-2), case


def test_the_plain_loop_learns(plain):
    assert plain["losses"][-1] < plain["losses"][0]


def test_every_zero_stage_gives_the_plain_losses(run_cases, plain):  # noqa: F811
    pytest.importorskip("deepspeed")
    check(run_cases(DEEPSPEED, 1), plain, 1e-5)


def test_compiled_blocks_give_the_plain_losses(run_cases, plain):  # noqa: F811
    pytest.importorskip("deepspeed")
    check(run_cases(COMPILED, 1), plain, 1e-5)


def test_bf16_and_fp16_with_dynamic_loss_scale_follow_float32(run_cases, plain):  # noqa: F811
    pytest.importorskip("deepspeed")
    results = run_cases(HALF, 1)
    for case, found in results.items():
        assert 0 < largest_difference(found["losses"], plain["losses"]) < 0.03, case
        assert found["losses"][-1] < found["losses"][0], case


def test_the_host_never_waits_for_the_gpu_in_a_step(run_cases):  # noqa: F811
    pytest.importorskip("deepspeed")
    cases = {name: DEEPSPEED[name] for name in ("ZeRO 0", "ZeRO 1", "ZeRO 2")}
    cases |= {"ZeRO 2, bf16": HALF["ZeRO 2, bf16"], "ZeRO 2, clipped": [*HALF["ZeRO 2, bf16"], CLIPPED]}
    cases["ZeRO 2, bf16, compiled"] = ["engine.zero_stage=2", "engine.precision=bf16", "engine.compile=true"]
    waits = {case: found["host_waits"] for case, found in run_cases(cases, 1).items()}
    assert waits == dict.fromkeys(cases, 0)


def test_fairscale_oss_gives_the_plain_losses(run_cases, plain):  # noqa: F811
    pytest.importorskip("fairscale")
    check(run_cases(OSS, 1), plain, 1e-5)
    in_bf16 = run_cases(OSS_BF16, 1)["FairScale OSS"]["losses"]
    assert 0 < largest_difference(in_bf16, plain["losses"]) < 0.03


@pytest.mark.parametrize("case", SHARDED)
def test_fairscale_fully_sharded_gives_the_plain_losses(case, run_cases, plain):  # noqa: F811
    pytest.importorskip("fairscale")
    check(run_cases({case: SHARDED[case]}, 1), plain, 1e-5)
