"""The time of a step that is planned from measured rates is that of the engine, on this machine's CPU."""

import json
from pathlib import Path

import pytest

from tests.integration.planned_time_worker import TOLERANCE
from tests.integration.ranks import run_worker

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(1500)]

WORKER = Path(__file__).with_name("planned_time_worker.py")
COMMON = ["data.root=unused", "engine.zero_stage=0", "engine.activation_checkpointing=none", "engine.compile=false"]


def case(
    image: int, patch: int, width: int, depth: int, decoder_width: int, decoder_depth: int, batch: int
) -> list[str]:
    sizes = {"image_size": image, "patch_size": patch, "width": width, "depth": depth, "heads": width // 32}
    sizes |= {"decoder_width": decoder_width, "decoder_depth": decoder_depth, "decoder_heads": decoder_width // 32}
    return [*COMMON, f"data.global_batch={batch}", *(f"model.{key}={value}" for key, value in sizes.items())]


CASES = {
    "96x3": case(32, 4, 96, 3, 64, 2, 128),
    "192x4": case(64, 8, 192, 4, 128, 2, 64),
    "128x24": case(224, 16, 128, 24, 64, 8, 16),
    "384x6": case(96, 8, 384, 6, 192, 4, 32),
    "768x12": case(224, 16, 768, 12, 512, 8, 4),
}


def test_planned_steps_of_five_sizes_take_the_time_that_is_measured(tmp_path):
    found = run_worker(WORKER, CASES, 1, tmp_path, timeout_s=1400)
    ratios = {name: step["ratio"] for name, step in found["steps"].items()}
    assert all(abs(ratio - 1) < TOLERANCE for ratio in ratios.values()), json.dumps(found["rounds"])
