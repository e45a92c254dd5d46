"""What the planner says a rank holds is what DeepSpeed holds, byte for byte but for scalars."""

from pathlib import Path

import pytest

from mae_scale.config.load import load_recipe
from mae_scale.engines.policy import layout_of
from mae_scale.planning.memory import BUCKET, Setting, states_of
from mae_scale.tasks.registry import task_of
from tests.integration.ranks import OnDemand, quick, run_worker

pytestmark = pytest.mark.timeout(600)

WORKER = Path(__file__).with_name("states_worker.py")
COMMON = ["engine.activation_checkpointing=none", "data.global_batch=24", "data.root=unused"]
MOCO = [f"model.{size}" for size in ("name=null", "image_size=32", "patch_size=8", "width=64", "depth=2", "heads=2")]
METHODS = {  # the ranks, and the recipe
    "mae": ((1, 2, 3, 4), ["demo", "engine.micro_batch=2"]),
    "beit": ((2,), ["pretrain/beit_demo", "engine.micro_batch=2"]),
    "moco": ((1, 2, 3), ["pretrain/moco_v3_vit_base", *MOCO, "moco.hidden=128", "moco.dim=32"]),
}
CASES = {
    f"{ranks} ranks, ZeRO {stage}, {precision}, {method}": [
        *recipe,
        *COMMON,
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}",
    ]
    for method, (numbers, recipe) in METHODS.items()
    for ranks in numbers
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    def run(cases):
        ranks = int(next(iter(cases))[0])
        return run_worker(WORKER, cases, ranks, tmp_path_factory.mktemp("states"))

    return OnDemand(CASES, run, group_of=lambda name: (name[0], name.rpartition(" ")[2]))


@pytest.mark.parametrize("case", quick(CASES, [name for name in CASES if name[0] == "2" and name.endswith("mae")]))
def test_planned_states_are_what_deepspeed_holds(case, held):
    recipe, ranks = load_recipe(CASES[case][0], CASES[case][1:]), int(case[0])
    layout = layout_of(recipe, ranks)
    stage, precision = recipe.engine.zero_stage, recipe.engine.precision
    setting = Setting(ranks, stage, precision, layout.micro_batch, layout.accumulation)
    # ZeRO 3 keeps its bucket between steps, whatever the model's size.
    bucket = setting.value_bytes * BUCKET if stage == 3 else 0
    assert held[case] == states_of(task_of(recipe, Path()).workload(10), setting) + bucket
