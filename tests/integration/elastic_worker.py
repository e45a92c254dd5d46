"""One rank of the resume tests: trains a small autoencoder from a checkpoint or from nothing, and saves one.

Run by tests/integration/test_elastic.py under torchrun: CASES.json OUT.json. Each case: {"overrides": [...],
"first": step, "last": step, "load": folder or null, "save": folder or null}; the losses of its steps come back.
"""

import json
import sys
import time
from pathlib import Path

import torch

from mae_scale.checkpoints import save
from mae_scale.checkpoints.resume import load_newest
from mae_scale.checkpoints.store import Retention
from mae_scale.config.load import load_recipe
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import leave, ranks_from_environment
from mae_scale.engines.policy import layout_of
from mae_scale.engines.select import scale_out
from mae_scale.models.build import build_model
from mae_scale.models.drop_path import draw_branch_scales
from mae_scale.tasks.mae.objective import Reconstruct
from tests.integration.engine_worker import TINY

GLOBAL_BATCH = 24  # divides by 1, 2 and 3 ranks, and by accumulation 2 on each


def tensors(objective: Reconstruct, step: int) -> tuple[torch.Tensor, ...]:
    """Images [24, 3, 16, 16], mask noise [24, 16], branch scales [24, 3, 2] of a step, the same on any ranks."""
    random = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=random)
    noise = torch.rand(GLOBAL_BATCH, 16, generator=random)
    rates = objective.model.encoder.drop_path_rates
    return images, noise, draw_branch_scales(rates, seed=0, step=step, positions=range(GLOBAL_BATCH))


def rate(step: int) -> float:
    return 1e-3 * min(1.0, (step + 1) / 5)


def run_case(case: dict, ranks, device) -> dict:
    recipe = load_recipe(
        "demo", [*TINY, f"data.global_batch={GLOBAL_BATCH}", "model.drop_path=0.2", *case["overrides"]]
    )
    torch.manual_seed(0 if case["load"] is None else 1)  # what is resumed must not come from the initialisation
    objective = Reconstruct(build_model(recipe), seed=recipe.seed)
    layout = layout_of(recipe, ranks.world_size)
    engine = scale_out(objective, recipe, layout, device)
    if case["load"]:
        manifest = load_newest(engine, Path(case["load"]), index="none")
        assert manifest["step"] == case["first"], manifest
    losses = []
    if case.get("poison"):
        return poisoned_step(engine, objective, layout)
    for step in range(case["first"], case["last"]):
        mine = [t[layout.positions(ranks.rank)] for t in tensors(objective, step)]
        micro_batches = zip(*(t.split(layout.micro_batch) for t in mine), strict=True)
        result = engine.train_step(micro_batches, rate(step))
        loss = result.loss / ranks.world_size
        torch.distributed.all_reduce(loss)
        losses.append(loss.item())
    if case["save"]:
        writer = save.Saver(
            Path(case["save"]), Retention(keep=1), background=case.get("background", True), timeout_s=60
        )
        facts = {"step": case["last"], "epoch": 0.5, "loss": None, "index": "none", "world_size": ranks.world_size}
        writer.save(engine.state(), facts)
        # Training goes on while it is written: what is saved must be the state as it was.
        mine = [t[layout.positions(0)] for t in tensors(objective, 10**6)]
        engine.train_step(zip(*(t.split(layout.micro_batch) for t in mine), strict=True), 1.0)
        assert writer.wait()
    engine.close()
    return losses


def poisoned_step(engine, objective: Reconstruct, layout) -> list[bool]:
    """[a good step is skipped, the state has changed, a step with a NaN on one rank is skipped, it has changed]."""
    answers = []
    for poison in (False, True):
        before = [piece.data.clone() for piece in engine.state().pieces]
        images, noise, scales = (t[layout.positions(0)].clone() for t in tensors(objective, 0))
        if poison and torch.distributed.get_rank() == 0:
            images[0, 0, 0, 0] = torch.nan
        micro_batches = zip(*(t.split(layout.micro_batch) for t in (images, noise, scales)), strict=True)
        skipped = engine.train_step(micro_batches, 1e-3).skipped()
        after = [piece.data for piece in engine.state().pieces]
        answers += [bool(skipped), not all(map(torch.equal, before, after))]
    answers.append(engine.state().scalars["optimizer_steps"] == 1)
    engine.close()
    return answers


def on_a_slow_disk(write):
    """Training has changed the state before anything is written."""

    def wait_and_write(*arguments):
        time.sleep(0.2)
        return write(*arguments)

    return wait_and_write


def main() -> None:
    save.write_shard = on_a_slow_disk(save.write_shard)
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = ranks_from_environment()
    results = {}
    with process_group(ranks, 120) as device:
        for name, case in cases.items():
            results[name] = run_case(case, ranks, device)
    if ranks.is_first:
        out.write_text(json.dumps(results))
    leave(0)


if __name__ == "__main__":
    main()
