"""One rank of the classifier's tests: trains a small one under each case, on as many ranks as there are.

Run under torchrun: CASES.json OUT.json. Each case: {"recipe", "overrides", "first", "last"}, and as it needs them
"load" (a folder of checkpoints; after another step with "stray"), "save", "look_at" (steps after which it predicts),
"poison". The plain loop that cases are compared with is here too: one process, float32, the whole global batch at once,
its groups, LARS and average written anew.
"""

import copy
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
from mae_scale.engines.policy import layout_of, refuse_wrong_combinations
from mae_scale.engines.select import scale_out
from mae_scale.models.build import build_classifier_of
from mae_scale.tasks.classification.objective import Classify

GLOBAL_BATCH = 24  # divides by 1, 2 and 3 ranks, into pairs, and by accumulation 2 on each
CLASSES, DEPTH, EMA = 10, 3, 0.9
TINY = [
    "model.image_size=16",
    "model.patch_size=4",
    "model.width=32",
    f"model.depth={DEPTH}",
    "model.heads=2",
    "model.drop_path=0.2",
    f"data.global_batch={GLOBAL_BATCH}",
    "data.root=unused",
]
MIXING = ["classifier.label_smoothing=0.1", "classifier.mixup=0.8", "classifier.cutmix=1.0"]  # unless it is a probe


def images_of(step: int, count: int = GLOBAL_BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 3, 16, 16] and labels [count] of a step: each class has a pattern, under noise."""
    patterns = torch.randn(CLASSES, 3, 16, 16, generator=torch.Generator().manual_seed(10**6))
    random = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (count,), generator=random)
    return patterns[labels] + torch.randn(count, 3, 16, 16, generator=random), labels


def unseen_images() -> torch.Tensor:
    return images_of(10**7, 12)[0]


def tensors(objective: Classify, step: int, positions: np.ndarray, poison: bool = False) -> tuple[torch.Tensor, ...]:
    """Images, soft targets and branch scales of some positions of a step's global batch."""
    images, labels = (t[positions] for t in images_of(step))
    if poison:
        images[0, 0, 0, 0] = torch.nan
    n = len(positions)
    return objective.tensors(
        Batch(images, labels, positions, positions, np.ones(n, bool), step, 0, drawn=objective.draw(step, positions)),
        torch.device("cpu"),
    )


def rate(recipe: Recipe, step: int) -> float:
    return (2.0 if recipe.optim.name == "lars" else 1e-3) * min(1.0, (step + 1) / 5)


def tiny_objective(recipe: str, overrides: list[str]) -> tuple[Classify, Recipe]:
    mixing = [] if recipe.startswith("probe/") else MIXING
    loaded = load_recipe(recipe, [*TINY, *mixing, *overrides])
    torch.manual_seed(0)
    return Classify(build_classifier_of(loaded, CLASSES), loaded.classifier, seed=loaded.seed), loaded


class Lars(torch.optim.Optimizer):
    """As in the authors' release: the trust ratio for what has more than one dimension, momentum for everything."""

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            update = parameter.grad
            if parameter.ndim > 1:
                update = update * (0.001 * parameter.norm() / update.norm())
            momentum = self.state[parameter].setdefault("mu", torch.zeros_like(parameter))
            momentum.mul_(0.9).add_(update)
            parameter.sub_(momentum * self.param_groups[0]["lr"])


def plain_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """A group for each parameter that is trained."""
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("encoder.blocks."):
            layers_after = DEPTH - int(name.split(".")[2])
        else:
            layers_after = 0 if name.startswith(("encoder.norm", "fc_norm", "head")) else DEPTH + 1
        decayed = parameter.ndim > 1 and name not in ("encoder.cls_token", "encoder.pos_embed")
        scale = recipe.optim.layer_decay**layers_after
        groups.append({"params": [parameter], "scale": scale, "weight_decay": recipe.optim.weight_decay * decayed})
    return groups


def plain_loop(recipe: str, overrides: list[str], look_at: list[int], steps: int) -> dict:
    """Losses; after the steps of look_at logits of unseen images, of the weights and of their average; BatchNorm."""
    objective, loaded = tiny_objective(recipe, overrides)
    model, bf16 = objective.model, loaded.engine.precision == "bf16"
    if loaded.classifier.batch_norm:
        model.batch_norm = nn.BatchNorm1d(32, affine=False, eps=1e-6)
    if bf16:
        model.encoder.bfloat16()
    groups = plain_groups(model, loaded)
    lars = loaded.optim.name == "lars"
    optimizer = Lars(groups) if lars else torch.optim.AdamW(groups, betas=loaded.optim.betas, eps=1e-8)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, looks = [], {}
    for step in range(steps):
        images, targets, *scales = tensors(objective, step, np.arange(GLOBAL_BATCH))
        for group in optimizer.param_groups:
            group["lr"] = rate(loaded, step) * group["scale"]
        model.train()
        optimizer.zero_grad()
        features = model.batch_norm(model.features(images, *scales).float())
        loss = nn.functional.cross_entropy(model.head(features), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            average[name] = EMA * average[name] + (1 - EMA) * parameter.detach()
        if step + 1 in look_at:
            model.eval()
            with torch.no_grad():
                averaged = torch.func.functional_call(model, average, (unseen_images(),))
                looks[str(step + 1)] = {"live": model(unseen_images()).tolist(), "averaged": averaged.tolist()}
    statistics = {name: b.tolist() for name, b in model.batch_norm.named_buffers() if name != "num_batches_tracked"}
    return {"losses": losses, "looks": looks, "statistics": statistics}


def run_case(case: dict, ranks, device) -> dict:
    objective, recipe = tiny_objective(case["recipe"], case["overrides"])
    if case.get("load") and not case.get("stray"):
        with torch.no_grad():
            for parameter in (p for p in objective.parameters() if p.requires_grad):
                parameter.fill_(torch.nan)  # what is resumed must not come from the initialisation
    start = copy.deepcopy(objective.state_dict())
    refuse_wrong_combinations(recipe, gpu=False)
    layout = layout_of(recipe, ranks.world_size)
    engine = scale_out(objective, recipe, layout, device)
    share = np.split(np.arange(GLOBAL_BATCH), ranks.world_size)[ranks.rank]

    def train_step(step: int, lr: float, poison: bool = False):
        parts = np.split(share, layout.accumulation)
        return engine.train_step((tensors(objective, step, part, poison) for part in parts), lr)

    if case.get("load"):
        if case.get("stray"):
            train_step(10**6, 1.0)
            look(engine, ranks)
        manifest = load_newest(engine, Path(case["load"]), index="none")
        assert manifest["step"] == case["first"], manifest
    if case.get("poison"):
        answer = poisoned_step(engine, train_step, ranks)
        engine.close()
        return answer
    losses, looks = [], {}
    for step in range(case["first"], case["last"]):
        loss = train_step(step, rate(recipe, step)).loss / ranks.world_size
        torch.distributed.all_reduce(loss)
        losses.append(loss.item())
        if step + 1 in case.get("look_at", ()):
            looks[str(step + 1)] = look(engine, ranks)
    answer = {"losses": losses, "looks": looks, **holdings(engine), **frozen(objective, start)}
    if case.get("save"):
        writer = Saver(Path(case["save"]), Retention(keep=1), background=True, timeout_s=60)
        facts = {"step": case["last"], "epoch": 0.5, "loss": None, "index": "none", "world_size": ranks.world_size}
        writer.save(engine.state(), facts)
        train_step(10**6, 1.0)  # what is saved must be the state as it was
        assert writer.wait()
    engine.close()
    return answer


def look(engine, ranks) -> dict:
    """Logits of all ranks' unseen images, of the weights and of their average; whether that has changed anything."""
    mine = unseen_images().chunk(ranks.world_size)[ranks.rank]

    def of_the_average() -> torch.Tensor:
        with engine.averaged():
            return engine.predict(mine)

    before = [piece.data.clone() for piece in engine.state().pieces]
    averaged, live, again = of_the_average(), engine.predict(mine), of_the_average()
    after = [piece.data for piece in engine.state().pieces]
    changed = not (all(map(torch.equal, before, after)) and torch.equal(averaged, again))
    every = gathered((live.tolist(), averaged.tolist(), changed))
    return {
        "live": [row for live, _, _ in every for row in live],
        "averaged": [row for _, averaged, _ in every for row in averaged],
        "changed": any(changed for _, _, changed in every),
    }


def holdings(engine) -> dict:
    """What all ranks would write, {name: elements}, and read, names; optimiser state a rank; BatchNorm's statistics."""
    state = engine.state()
    mine = [(piece.name, piece.data.numel()) for piece in state.own]
    optimizer = engine._own_optimizer() if hasattr(engine, "_own_optimizer") else engine._optimizer
    kept = [value.numel() for moments in optimizer.state.values() for k, value in moments.items() if k != "step"]
    every = gathered((mine, sum(kept), [piece.name for piece in state.pieces]))
    written: dict[str, int] = {}
    for name, count in (piece for pieces, _, _ in every for piece in pieces):
        written[name] = written.get(name, 0) + count
    buffers = [piece for piece in state.pieces if piece.name.startswith("buffer/")]
    return {
        "written": written,
        "held": sorted({name for _, _, names in every for name in names}),
        "kept": [kept for _, kept, _ in every],
        "statistics": {piece.name.rpartition(".")[2]: piece.data.tolist() for piece in buffers},
        "statistics_dtypes": sorted({str(piece.data.dtype) for piece in buffers}),
    }


def frozen(objective: Classify, start: dict[str, torch.Tensor]) -> dict:
    """How many weights are not trained, and which of them are no longer bit for bit those of the start."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    parameters = {name: p for name, p in objective.named_parameters() if not p.requires_grad}
    with GatheredParameters(list(parameters.values())):
        moved = [name for name, p in parameters.items() if not torch.equal(p.data, start[name].to(p.dtype))]
    return {"frozen": len(parameters), "moved": moved}


def poisoned_step(engine, train_step, ranks) -> list[dict]:
    """Of a good step, one with a NaN on one rank, and a good one: whether it was skipped, and what it has changed."""
    answers = []
    for step, poison in enumerate((False, True, False)):
        before = {piece.name: piece.data.clone() for piece in engine.state().pieces}
        skipped = bool(train_step(step, 1e-3, poison and ranks.is_first).skipped())
        after = {piece.name: piece.data for piece in engine.state().pieces}
        changed = sorted({name.partition("/")[0] for name in after if not torch.equal(before[name], after[name])})
        answers.append({"skipped": skipped, "changed": sorted(set().union(*gathered(changed)))})
    return answers


def gathered(mine) -> list:
    """Every rank's."""
    every: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    return every


def main() -> None:
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
