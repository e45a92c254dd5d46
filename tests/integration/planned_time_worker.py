"""One rank that measures this machine's rates, then the engine's step for some sizes beside what is planned.

Run by test_planned_time.py and tests/gpu/test_planned.py: CASES.json OUT.json; each case is a list of overrides of the
demo, with a micro-batch.
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
from mae_scale.planning.hardware import DEFAULT_LINK, gpu_of_device, link_named
from mae_scale.planning.measure import measure
from mae_scale.planning.memory import memory_of
from mae_scale.planning.rates import Rates, calibrated, cpu_rates, rates_of
from mae_scale.planning.step_time import step_time
from mae_scale.tasks.mae.objective import Reconstruct
from mae_scale.tasks.registry import task_of
from mae_scale.training.planned import setting_of

STEPS, ROUNDS, MOST_ROUNDS = 5, 3, 9
TOLERANCE = 0.2


def rates_of_device(device: torch.device, precision: str) -> Rates:
    """The device's rates, measured now."""
    found = measure(device, precision)
    if device.type == "cpu":
        return cpu_rates(found, "measured")
    sheet = gpu_of_device(torch.cuda.get_device_name(device))
    assert sheet is not None, "this GPU is not in hardware.yaml"
    return calibrated(rates_of(sheet, link_named(DEFAULT_LINK), link_named(sheet.link), precision), found, "measured")


def planned(recipe: Recipe, rates: Rates, gpu: bool) -> dict[str, float]:
    """Seconds of a step and GiB that torch allocates, as planned."""
    setting = setting_of(recipe, layout_of(recipe, 1), gpu=gpu, decodes=False)
    work = task_of(recipe, Path()).workload(10)
    seconds = step_time(work, setting, Cluster(1, 1), rates).total
    return {"planned_s": seconds, "planned_gib": memory_of(work, setting).allocated / 2**30}


def measured(recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Median seconds of the engine's step, and on a GPU the peak of what torch allocates."""
    gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if gpu else lambda: None
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = build_model(recipe)
    side, patches = model.image_size, model.patches
    layout = layout_of(recipe, 1)
    engine = scale_out(Reconstruct(model, seed=0), recipe, layout, device)
    images = torch.randn(layout.micro_batch, 3, side, side, device=device)
    batch = [(images, torch.rand(layout.micro_batch, patches, device=device))] * layout.accumulation
    times = []
    for _ in range(2 + STEPS):
        wait()
        began = time.perf_counter()
        engine.train_step(iter(batch), 1e-4)
        wait()
        times.append(time.perf_counter() - began)
    engine.close()
    peak = {"measured_gib": torch.cuda.max_memory_allocated() / 2**30} if gpu else {}
    return {"measured_s": statistics.median(times[2:]), **peak}


def one_round(recipes: dict[str, Recipe], device: torch.device, precision: str) -> dict[str, dict[str, float]]:
    """Return what is planned and measured for each recipe, by the rates just before and just after its steps.

    A machine's rates change within a minute, by what else it does.
    """
    found, gpu, before = {}, device.type == "cuda", rates_of_device(device, precision)
    for name, recipe in recipes.items():
        step = measured(recipe, device)
        after = rates_of_device(device, precision)
        plans = [planned(recipe, rates, gpu) for rates in (before, after)]
        step |= plans[0] | {"planned_s": statistics.fmean(plan["planned_s"] for plan in plans)}
        found[name] = {**step, "ratio": step["planned_s"] / step["measured_s"]}
        before = after
    return found


def median_of(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return of each recipe the round of the median ratio; of an even number of rounds the upper one."""
    return {
        name: sorted((one[name] for one in rounds), key=lambda step: step["ratio"])[len(rounds) // 2]
        for name in rounds[0]
    }


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = ranks_from_environment()
    torch.set_num_threads(1)
    with process_group(ranks, 120) as device:
        recipes = {name: load_recipe("demo", overrides) for name, overrides in cases.items()}
        precision = "bf16" if device.type == "cuda" else "fp32"
        rounds: list[dict[str, dict[str, float]]] = []
        while len(rounds) < MOST_ROUNDS:  # more than ROUNDS only where the median of all so far is not within TOLERANCE
            rounds.append(one_round(recipes, device, precision))
            found = median_of(rounds)
            if len(rounds) >= ROUNDS and all(abs(step["ratio"] - 1) < TOLERANCE for step in found.values()):
                break
    out.write_text(json.dumps({"steps": found, "rounds": [{n: s["ratio"] for n, s in r.items()} for r in rounds]}))
    leave(0)


if __name__ == "__main__":
    main()
