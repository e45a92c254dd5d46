"""One rank that measures this machine's rates, then times the engine's step for five sizes beside what is planned.

Run by test_planned_time.py: CASES.json OUT.json; each case is a list of overrides of the demo, with a micro-batch.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

from mae_scale.config.load import load_recipe
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import leave, ranks_from_environment
from mae_scale.engines.policy import layout_of
from mae_scale.engines.select import scale_out
from mae_scale.models.build import build_model
from mae_scale.planning.collectives import Cluster
from mae_scale.planning.hardware import gpu_named, link_named
from mae_scale.planning.measure import measure
from mae_scale.planning.memory import Setting
from mae_scale.planning.rates import calibrated, rates_of
from mae_scale.planning.step_time import step_time
from mae_scale.tasks.mae.objective import Reconstruct
from mae_scale.tasks.registry import task_of

STEPS, ROUNDS = 5, 3


def planned(recipe: Recipe, rates: dict) -> float:
    """Seconds of a step as planned with measured rates; what these replace is a GPU's."""
    gpu = gpu_named("v100")
    assumed = rates_of(gpu, link_named("ethernet-10"), link_named(gpu.link), "fp32")
    layout = layout_of(recipe, 1)
    setting = Setting(1, recipe.engine.zero_stage, "fp32", layout.micro_batch, layout.accumulation, compiled=False)
    work = task_of(recipe, Path()).workload(10)
    return step_time(work, setting, Cluster(1, 1), calibrated(assumed, rates, "measured")).total


def measured(recipe: Recipe, device: torch.device) -> float:
    """Median seconds of the engine's step."""
    model = build_model(recipe)
    side, patches = model.image_size, model.patches
    layout = layout_of(recipe, 1)
    engine = scale_out(Reconstruct(model, seed=0), recipe, layout, device)
    batch = [(torch.randn(layout.micro_batch, 3, side, side), torch.rand(layout.micro_batch, patches))]
    times = []
    for _ in range(1 + STEPS):
        began = time.perf_counter()
        engine.train_step(iter(batch), 1e-4)
        times.append(time.perf_counter() - began)
    engine.close()
    return statistics.median(times[1:])


def one_round(recipes: dict[str, Recipe], device: torch.device) -> dict[str, dict[str, float]]:
    """Return each recipe's planned and measured seconds, and their ratio, by rates that are measured now.

    A machine's rates change over minutes, by what else it does: the median of rounds forgives one.
    """
    rates, found = measure(device, "fp32"), {}
    for name, recipe in recipes.items():
        step = {"planned_s": planned(recipe, rates), "measured_s": measured(recipe, device)}
        found[name] = {**step, "ratio": step["planned_s"] / step["measured_s"]}
    return found


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = ranks_from_environment()
    torch.set_num_threads(1)
    with process_group(ranks, 120) as device:
        recipes = {name: load_recipe("demo", overrides) for name, overrides in cases.items()}
        rounds = [one_round(recipes, device) for _ in range(ROUNDS)]
    found = {name: sorted((one[name] for one in rounds), key=lambda step: step["ratio"])[ROUNDS // 2] for name in cases}
    out.write_text(json.dumps({"steps": found}))
    leave(0)


if __name__ == "__main__":
    main()
