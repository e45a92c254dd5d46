"""One rank of BEiT's tests: trains a small one under each case, on as many ranks as there are.

Run under torchrun: CASES.json OUT.json. Each case: {"overrides", "first", "last"}, and as it needs them "load" and
"save" (folders of checkpoints). The plain loop that cases are compared with is here too: one process, float32, the
whole global batch at once, the loss written anew as the mean over all removed patches.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data_pipeline.batches import Batch
from mae_scale.checkpoints.resume import load_newest
from mae_scale.checkpoints.save import Saver
from mae_scale.checkpoints.store import Retention
from mae_scale.config.load import load_recipe
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import leave, ranks_from_environment
from mae_scale.engines.optimizers import parameter_groups
from mae_scale.engines.policy import layout_of, refuse_wrong_combinations
from mae_scale.engines.select import scale_out
from mae_scale.models.build import build_beit
from mae_scale.tasks.beit.objective import PredictRemoved
from mae_scale.tasks.words import TokenisedWords
from tests.tokenisers import tiny_tokeniser

GLOBAL_BATCH, WORDS, GRID = 24, 16, 8  # the batch divides by 1, 2 and 3 ranks, and by accumulation 2 on each
TINY = [
    "model.image_size=32",
    "model.patch_size=4",
    "model.width=32",
    "model.depth=3",
    "model.heads=2",
    "model.drop_path=0.2",
    f"data.global_batch={GLOBAL_BATCH}",
    "data.root=unused",
]


def tiny_objective(overrides: list[str]) -> tuple[PredictRemoved, Recipe]:
    recipe = load_recipe("pretrain/beit_demo", [*TINY, *overrides])
    views = torch.rand(GLOBAL_BATCH, 3, 8 * GRID, 8 * GRID, generator=torch.Generator().manual_seed(5))
    words = TokenisedWords(tiny_tokeniser(views, WORDS)) if recipe.model.target == "tokens" else None
    torch.manual_seed(recipe.seed)
    model = build_beit(recipe, WORDS)
    return PredictRemoved(model, words, seed=recipe.seed, global_batch=GLOBAL_BATCH), recipe


def tensors(
    objective: PredictRemoved, step: int, positions: np.ndarray, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, ...]:
    """The arguments of the objective for some positions of a step's global batch."""
    random = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=random)[positions]
    views = torch.rand(GLOBAL_BATCH, 3, 8 * GRID, 8 * GRID, generator=random)[positions]
    known = np.ones(len(positions), bool)
    batch = Batch(images, images, positions, positions, known, step, 0, drawn=objective.draw(step, positions))
    batch.second = views
    return objective.tensors(batch, torch.device(device))


def rate(step: int) -> float:
    return 1e-3 * min(1.0, (step + 1) / 5)


def plain_loop(overrides: list[str], last: int) -> list[float]:
    """Losses of torch.optim.AdamW on the whole global batch; each is the mean over its removed patches."""
    objective, recipe = tiny_objective(overrides)
    optimizer = torch.optim.AdamW(parameter_groups(objective, recipe.optim), betas=recipe.optim.betas)
    losses = []
    for step in range(last):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        images, mask, _, *others = tensors(objective, step, np.arange(GLOBAL_BATCH))
        words = others.pop(0) if objective.words else None
        of_patches, _ = objective.model(images, mask, words, *others)
        loss = of_patches.sum() / mask.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), recipe.optim.clip_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def run_case(case: dict, ranks, device) -> list[float]:
    objective, recipe = tiny_objective(case["overrides"])
    refuse_wrong_combinations(recipe, gpu=False)
    if case["load"]:  # what is resumed must not come from the initialisation
        nn.init.normal_(objective.model.encoder.rel_pos_bias.relative_position_bias_table)
    layout = layout_of(recipe, ranks.world_size)
    engine = scale_out(objective, recipe, layout, device)
    assert not any("tokeniser" in piece.name or "words" in piece.name for piece in engine.state().pieces)
    if case["load"]:
        assert load_newest(engine, Path(case["load"]), index="none")["step"] == case["first"]
    positions, losses = np.arange(GLOBAL_BATCH)[layout.positions(ranks.rank)], []
    for step in range(case["first"], case["last"]):
        micro = [positions[i : i + layout.micro_batch] for i in range(0, len(positions), layout.micro_batch)]
        result = engine.train_step([tensors(objective, step, part, device) for part in micro], rate(step))
        loss = result.loss / ranks.world_size
        torch.distributed.all_reduce(loss)
        losses.append(loss.item())
    if case["save"]:
        writer = Saver(Path(case["save"]), Retention(keep=1), background=False, timeout_s=60)
        facts = {"step": case["last"], "epoch": 0.5, "loss": None, "index": "none", "world_size": ranks.world_size}
        writer.save(engine.state(), facts)
        assert writer.wait()
    engine.close()
    return losses


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = ranks_from_environment()
    with process_group(ranks, 120) as device:
        results = {name: run_case(case, ranks, device) for name, case in cases.items()}
    if ranks.is_first:
        out.write_text(json.dumps(results))
    leave(0)


if __name__ == "__main__":
    main()
