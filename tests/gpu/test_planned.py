"""On a GPU a step takes the time and the memory that are planned by its measured rates."""

import pytest

pytest.importorskip("pydantic")

from tests.integration.ranks import run_worker
from tests.integration.test_planned_time import WORKER

pytestmark = pytest.mark.timeout(600)

SIZES = {"B": "vit_base_patch16", "L": "vit_large_patch16", "H": "vit_huge_patch14"}


def case(size: str, images: int, checkpointing: str) -> list[str]:
    sizes = [f"model.name={SIZES[size]}", "model.image_size=224", "model.decoder_width=512", "model.decoder_depth=8"]
    engine = ["engine.zero_stage=2", "engine.precision=bf16", f"engine.activation_checkpointing={checkpointing}"]
    return [*sizes, "model.decoder_heads=16", *engine, "data.root=unused", f"data.global_batch={images}"]


CASES = {
    f"ViT-{size}, {images} images, checkpointing {checkpointing}": case(size, images, checkpointing)
    for size, images, checkpointing in (("B", 128, "none"), ("L", 64, "none"), ("L", 256, "all"), ("H", 64, "none"))
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    pytest.importorskip("deepspeed")
    return run_worker(WORKER, CASES, 1, tmp_path_factory.mktemp("planned"))["steps"]


def test_steps_take_the_time_that_is_planned_by_measured_rates(steps):
    ratios = {name: step["ratio"] for name, step in steps.items()}
    assert all(abs(ratio - 1) < 0.2 for ratio in ratios.values()), ratios


def test_torch_allocates_the_memory_that_is_planned(steps):
    ratios = {name: step["planned_gib"] / step["measured_gib"] for name, step in steps.items()}
    assert all(abs(ratio - 1) < 0.1 for ratio in ratios.values()), ratios
