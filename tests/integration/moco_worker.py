"""One rank of MoCo v3's tests: trains a small one under each case, on as many ranks as there are.

Run under torchrun: CASES.json OUT.json. Each case: {"overrides", "first", "last"}, and as it needs them "load" (a
folder of checkpoints), "save", "poison". The loop that cases are compared with is here too, written from the paper's
algorithm 1 on timm's Vision Transformer and torch's BatchNorm: one process, float32, the whole global batch at once.
"""

import copy
import itertools
import json
import math
import sys
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_scale.checkpoints.resume import load_newest
from mae_scale.checkpoints.save import Saver
from mae_scale.checkpoints.shards import MOMENTUM
from mae_scale.checkpoints.store import Retention
from mae_scale.config.load import load_recipe
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import leave, ranks_from_environment
from mae_scale.engines.policy import layout_of, refuse_wrong_combinations
from mae_scale.engines.select import scale_out
from mae_scale.models.build import build_moco_of
from mae_scale.models.moco import Moco
from mae_scale.tasks.moco.objective import Contrast
from mae_scale.training.schedule import momentum

GLOBAL_BATCH, STEPS, TOTAL = 24, 12, 20  # a step's images; steps of a test, and of the schedule that they belong to
TEMPERATURE, START = 0.2, 0.9  # a momentum at which twelve steps are seen in the curve
TINY = [
    "task=moco",
    "model.name=null",
    "model.image_size=16",
    "model.patch_size=4",
    "model.width=32",
    "model.depth=3",
    "model.heads=2",
    "moco.hidden=48",
    "moco.dim=16",
    f"moco.momentum={START}",
    "optim.weight_decay=0.1",
    f"data.global_batch={GLOBAL_BATCH}",
    "data.root=unused",
]


def views(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views [24, 3, 16, 16] of a step's images: the image and noise, twice."""
    random = torch.Generator().manual_seed(step)
    images, first, second = (torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=random) for _ in range(3))
    return images + 0.5 * first, images + 0.5 * second


def rate(step: int) -> float:
    return 2e-3 * min(1.0, (step + 1) / 5)


def tiny_objective(overrides: list[str], seed: int = 0):
    recipe = load_recipe("demo", [*TINY, *overrides])
    torch.manual_seed(seed)
    return Contrast(build_moco_of(recipe), temperature=recipe.contrast.temperature), recipe


def plain_mlp(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(inner, outer, bias=False), nn.BatchNorm1d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=False), nn.BatchNorm1d(widths[-1], affine=False))


def plain_encoder(model: Moco) -> VisionTransformer:
    """timm's Vision Transformer with the weights of ours, and the projector as its head."""
    encoder = VisionTransformer(16, 4, num_classes=0, global_pool="token", embed_dim=32, depth=3, num_heads=2)
    encoder.head = plain_mlp([32, 48, 48, 16])
    state = {}
    for name, value in model.state_dict().items():
        if name.startswith("encoder.patch_embed."):
            name = name.replace("patch_embed.", "patch_embed.proj.")
            value = value.reshape(32, 4, 4, 3).permute(0, 3, 1, 2) if value.ndim == 2 else value
        if not name.startswith("predictor."):
            state[name.removeprefix("encoder.").replace("projector.", "head.")] = value
    report = encoder.load_state_dict(state | {"pos_embed": model.encoder.pos_embed[None]}, strict=False)
    assert not report.unexpected_keys
    assert all(key.rpartition(".")[2].startswith(("running_", "num_batches")) for key in report.missing_keys), report
    for frozen in (encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, encoder.pos_embed):
        frozen.requires_grad = False
    return encoder


def plain_loop() -> dict:
    """Losses, and the sum of each of the momentum encoder's parameters' squares at the end."""
    objective, recipe = tiny_objective([])
    base, predictor = plain_encoder(objective.model), plain_mlp([16, 48, 16])
    predictor.load_state_dict(objective.model.predictor.state_dict(), strict=False)
    averaged = copy.deepcopy(base)
    trained = [p for p in [*base.named_parameters(), *predictor.named_parameters()] if p[1].requires_grad]
    plain = [p for name, p in trained if p.ndim > 1 and name != "cls_token"]
    rest = [p for name, p in trained if p.ndim <= 1 or name == "cls_token"]
    groups = [{"params": plain, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=recipe.optim.betas, eps=1e-8)

    def ctr(q, k):
        logits = nn.functional.normalize(q, dim=1) @ nn.functional.normalize(k, dim=1).T
        labels = torch.arange(len(q))
        return 2 * TEMPERATURE * nn.functional.cross_entropy(logits / TEMPERATURE, labels)

    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        x1, x2 = views(step)
        q1, q2 = predictor(base(x1)), predictor(base(x2))
        m = 1 - (1 - START) * (1 + math.cos(math.pi * step / TOTAL)) / 2
        with torch.no_grad():
            for own, mean in zip(base.parameters(), averaged.parameters(), strict=True):
                mean.copy_(m * mean + (1 - m) * own)
            k1, k2 = averaged(x1), averaged(x2)
        loss = ctr(q1, k2) + ctr(q2, k1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    squares = {n: p.detach().double().square().sum().item() for n, p in averaged.named_parameters()}
    return {"losses": losses, "averages": sum(v for n, v in squares.items() if n not in FROZEN)}


FROZEN = ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")


def run_case(case: dict, ranks, device) -> dict:
    # What is resumed must not come from the initialisation.
    objective, recipe = tiny_objective(case["overrides"], seed=1 if case.get("load") else 0)
    refuse_wrong_combinations(recipe, gpu=device.type == "cuda")
    layout = layout_of(recipe, ranks.world_size)
    engine = scale_out(objective, recipe, layout, device)
    if case.get("load"):
        manifest = load_newest(engine, Path(case["load"]), index="none")
        assert manifest["step"] == case["first"], manifest
    share = layout.positions(ranks.rank)

    def train_step(step: int, lr: float, poison: bool = False):
        mine = [view[share].to(device) for view in views(step)]
        if poison:
            mine[0][0, 0, 0, 0] = torch.nan
        return engine.train_step([tuple(mine)], lr, momentum(step, start=START, total=TOTAL))

    losses, skipped = [], []
    for step in range(case.get("first", 0), case.get("last", STEPS)):
        result = train_step(step, rate(step), poison=step == case.get("poison") and ranks.is_first)
        loss = result.loss / ranks.world_size
        torch.distributed.all_reduce(loss)
        losses.append(loss.item())
        skipped.append(bool(result.skipped()))
    answer = {"losses": losses, "skipped": skipped, **momentum_encoder(engine, objective)}
    answer["compiled_frames"] = torch._dynamo.utils.counters["frames"]["ok"]
    if case.get("save"):
        writer = Saver(Path(case["save"]), Retention(keep=1), background=True, timeout_s=60)
        facts = {"step": case["last"], "epoch": 0.5, "loss": None, "index": "none", "world_size": ranks.world_size}
        writer.save(engine.state(), facts)
        train_step(10**6, 1.0)  # what is saved must be the state as it was
        assert writer.wait()
    engine.close()
    return answer


def momentum_encoder(engine, objective: Contrast) -> dict:
    """The sum of squares of the average of encoder and projector, and of the copy that keys are computed with."""
    followers = objective.followers
    mine = [p for p in engine.state().own if p.name.partition("/")[2] in followers]
    mine = [p.data.double().square().sum().item() for p in mine if p.name.startswith(f"{MOMENTUM}/")]
    parts: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, sum(mine))
    copied = sum(value.double().square().sum().item() for value in followers.values())
    dtypes = sorted({str(value.dtype) for value in followers.values()})
    kept = sorted({str(p.data.dtype) for p in engine.state().own if p.name.startswith(f"{MOMENTUM}/")})
    return {"averages": sum(parts), "copied": copied, "copied_dtypes": dtypes, "kept_dtypes": kept}


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
