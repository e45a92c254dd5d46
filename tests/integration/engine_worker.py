"""One rank of the engine comparison: trains the same small autoencoder under each case and writes the losses.

Run by tests/integration/test_engines.py under torchrun: CASES.json OUT.json.
Each case: {"overrides": [...], "micro_batch": n}; STEPS steps on synthetic images, the same global batches for all.
"""

import json
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mae_scale.config.load import load_recipe
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import leave, ranks_from_environment
from mae_scale.engines.optimizers import parameter_groups
from mae_scale.engines.policy import layout_of, refuse_wrong_combinations
from mae_scale.engines.select import scale_out
from mae_scale.models.build import build_model
from mae_scale.models.drop_path import draw_branch_scales
from mae_scale.tasks.mae.objective import Reconstruct

STEPS, GLOBAL_BATCH = 20, 16
TINY = [
    "model.name=null",
    "model.image_size=16",
    "model.patch_size=4",
    "model.width=32",
    "model.depth=3",
    "model.heads=2",
    "model.decoder_width=16",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
    f"data.global_batch={GLOBAL_BATCH}",
    "data.root=unused",
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
]


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [16, 3, 16, 16] and mask noise [16, 16] of a step."""
    random = torch.Generator().manual_seed(step)
    return torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=random), torch.rand(GLOBAL_BATCH, 16, generator=random)


def with_branch_scales(tensors, objective: Reconstruct, step: int, positions: np.ndarray) -> list[torch.Tensor]:
    """A step's tensors at some positions; with drop path also the encoder's branch scales, as `Reconstruct` does."""
    mine, rates = [t[positions] for t in tensors], objective.model.encoder.drop_path_rates
    if any(rates):
        mine.append(draw_branch_scales(rates, seed=objective.seed, step=step, positions=positions))
    return mine


def rate(step: int) -> float:
    return 1e-3 * min(1.0, (step + 1) / 5)


def tiny_objective(overrides: list[str]) -> tuple[Reconstruct, object]:
    recipe = load_recipe("demo", [*TINY, *overrides])
    torch.manual_seed(recipe.seed)
    return Reconstruct(build_model(recipe), seed=recipe.seed), recipe


class HostWaits(TorchDispatchMode):
    """Counts, in its block, what makes the host wait for a GPU: numbers read of tensors, and tensors made of numbers.

    The second kind (torch.tensor(number, device=...)) is a copy from memory that is not page-locked.
    """

    def __init__(self):
        super().__init__()
        self.count, self._make = 0, torch.tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        torch.tensor = self._counted
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor = self._make
        return super().__exit__(*error)

    def _counted(self, *args, **kwargs):
        self.count += kwargs.get("device") is not None
        return self._make(*args, **kwargs)


class HostWaitsOnGPU:
    """Counts, in its block, what torch warns of as a wait for the GPU, and whole synchronisations."""

    def __enter__(self):
        self._synchronizations, self._synchronize = 0, torch.cuda.synchronize
        self._catching = warnings.catch_warnings(record=True)
        self._caught = self._catching.__enter__()
        warnings.simplefilter("always")
        torch.cuda.synchronize = self._counted
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize = self._synchronize
        self._catching.__exit__(*error)

    def _counted(self, *args, **kwargs):
        self._synchronizations += 1
        self._synchronize(*args, **kwargs)

    @property
    def count(self) -> int:
        return self._synchronizations + sum("synchroniz" in str(warning.message) for warning in self._caught)


class Flattened(TorchDispatchMode):
    """Keeps, in its block, how many elements the longest row [n] has that was put together of tensors."""

    def __init__(self):
        super().__init__()
        self.longest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default and result.ndim == 1:
            self.longest = max(self.longest, len(result))
        return result


def plain_loop(clip: float | None = None, device: str = "cpu", overrides: tuple[str, ...] = ()) -> dict:
    """Losses, gradient norms and sums of weights of torch.optim.AdamW in float32, the whole global batch at once."""
    objective, recipe = tiny_objective([*overrides])
    objective.to(device)
    groups = parameter_groups(objective, recipe.optim)
    optimizer = torch.optim.AdamW(groups, betas=recipe.optim.betas)
    losses, norms = [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad()
        tensors = with_branch_scales(global_batch(step), objective, step, np.arange(GLOBAL_BATCH))
        loss = objective(*(tensor.to(device) for tensor in tensors))
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(objective.parameters(), clip or float("inf")).item())
        optimizer.step()
        losses.append(loss.item())
    weights = {name: t.detach().double().sum().item() for name, t in objective.named_parameters()}
    return {"losses": losses, "norms": norms, "weights": weights}


def run_case(overrides: list[str], ranks, device) -> dict:
    torch._dynamo.utils.counters.clear()
    objective, recipe = tiny_objective(overrides)
    refuse_wrong_combinations(recipe, gpu=device.type == "cuda")
    layout = layout_of(recipe, ranks.world_size)
    engine = scale_out(objective, recipe, layout, device)
    # Under a dispatch mode nothing is compiled, and what was met there once is never compiled afterwards.
    on_cpu, flattened = (nullcontext(),) * 2 if recipe.engine.compile else (HostWaits(), Flattened())
    counting = on_cpu if device.type == "cpu" else HostWaitsOnGPU()
    losses, norms = [], []
    positions = np.arange(GLOBAL_BATCH)[layout.positions(ranks.rank)]
    for step in range(STEPS):
        mine = [t.to(device) for t in with_branch_scales(global_batch(step), objective, step, positions)]
        micro_batches = zip(*(t.split(layout.micro_batch) for t in mine), strict=True)
        last = step == STEPS - 1
        with counting if last else nullcontext(), flattened if last else nullcontext():
            result = engine.train_step(micro_batches, rate(step))
        loss = result.loss / ranks.world_size
        torch.distributed.all_reduce(loss)
        losses.append(loss.item())
        norms.append(result.grad_norm())
    weights = sums_of_weights(engine)
    engine.close()
    compiled_frames = torch._dynamo.utils.counters["frames"]["ok"]
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "compiled_frames": compiled_frames,
        "host_waits": getattr(counting, "count", None),  # of the last step
        "flattened": getattr(flattened, "longest", None),  # the same
        "parameters": sum(parameter.numel() for parameter in objective.parameters()),
    }


def sums_of_weights(engine) -> dict[str, float]:
    """{parameter: sum} from what the ranks would write into a checkpoint."""
    mine = [(p.name, p.data.double().sum().item()) for p in engine.state().own if p.name.startswith("weight/")]
    parts: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    sums: dict[str, float] = {}
    for name, value in (piece for part in parts for piece in part):
        sums[name.removeprefix("weight/")] = sums.get(name.removeprefix("weight/"), 0.0) + value
    return sums


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = ranks_from_environment()
    results = {}
    with process_group(ranks, 120) as device:
        for name, overrides in cases.items():
            results[name] = run_case(overrides, ranks, device)
    if ranks.is_first:
        out.write_text(json.dumps(results))
    leave(0)


if __name__ == "__main__":
    main()
