"""From a recipe to what the engine is given: batch layout, the complete DeepSpeed file, and what is refused."""

from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import UsageError
from mae_scale.config.schema import Recipe
from mae_scale.engines.deepspeed_templates import read_template
from mae_scale.engines.policy import precision_of


@dataclass(frozen=True)
class BatchLayout:
    """global batch = world_size x micro_batch x accumulation."""

    global_batch: int
    world_size: int
    micro_batch: int
    accumulation: int


def batch_layout(recipe: Recipe, world_size: int) -> BatchLayout:
    """How the recipe's global batch is spread over the ranks; UsageError with what would fit when it cannot be.

    A rank's micro-batch is engine.micro_batch, or all of its share where that is less.
    """
    total, micro = recipe.data.global_batch, recipe.engine.micro_batch
    if total % world_size:
        above = total + world_size - total % world_size
        fits = _listed(sorted({total - total % world_size or above, above}))
        ranks = _around(_divisors(total), world_size)
        raise UsageError(
            f"data.global_batch={total} does not divide by {world_size} ranks; with {world_size} ranks "
            f"{fits} would fit, with this batch {_listed(ranks)} ranks"
        )
    share = total // world_size
    micro = min(micro or share, share)
    if share % micro:
        raise UsageError(
            f"engine.micro_batch={micro} does not divide a rank's share of {share} images "
            f"(data.global_batch={total} over {world_size} ranks); "
            f"engine.micro_batch={_listed(_around(_divisors(share), micro))} would fit"
        )
    return BatchLayout(total, world_size, micro, share // micro)


def deepspeed_config(recipe: Recipe, layout: BatchLayout, *, gpu: bool) -> dict[str, Any]:
    """The complete DeepSpeed configuration: ds_configs/zeroN.json or engine.config, every "auto" filled in.

    A file of the user's own decides the ZeRO stage. Raises UsageError where it contradicts the recipe.
    """
    config, source = read_template(recipe)
    precision = precision_of(recipe, gpu)
    zero = config.setdefault("zero_optimization", {"stage": 0})
    ours = checks_gradients(config, precision)
    # Gradients of bf16 weights add up in fp32 wherever DeepSpeed has it, which is in ZeRO 1 to 3.
    accumulate = None if precision != "bf16" else "fp32" if zero.get("stage", 0) else "bf16"
    decided = {
        ("train_batch_size",): layout.global_batch,
        ("train_micro_batch_size_per_gpu",): layout.micro_batch,
        ("gradient_accumulation_steps",): layout.accumulation,
        ("gradient_clipping",): 0.0 if ours else recipe.optim.clip_grad_norm or 0.0,
        ("bf16", "enabled"): precision == "bf16",
        ("fp16", "enabled"): precision == "fp16",
        ("data_types", "grad_accum_dtype"): accumulate,
    }
    if ours and zero.get("stage", 0):
        decided["zero_optimization", "compute_grad_norm"] = False
        decided["bf16", "check_grad_overflow"] = False
    for path, value in decided.items():
        section = config
        for key in path[:-1]:
            section = section.setdefault(key, {})
        found = section.get(path[-1], "auto")
        if found not in ("auto", value) and path[0] != "data_types":
            raise UsageError(
                f"{source} sets {'.'.join(path)}={found}, the recipe makes it {value}; "
                f'write "auto" there, the recipe decides it'
            )
        if found == "auto":
            section[path[-1]] = value
    if zero.get("overlap_comm") == "auto":
        zero["overlap_comm"] = layout.world_size > 1  # with it DeepSpeed waits for the device after each micro-batch
    for place in ("offload_optimizer", "offload_param"):
        if zero.get(place, {}).get("pin_memory") == "auto":
            zero[place]["pin_memory"] = gpu
        if zero.get(place, {}).get("device") == "nvme":
            raise UsageError(f"{source} offloads to nvme, from where no checkpoint is written; use device cpu there")
    for forbidden in ("optimizer", "scheduler"):
        if forbidden in config:
            raise UsageError(
                f"{source} has a section '{forbidden}'; the recipe decides it (optim, schedule): remove it"
            )
    left = [key for key, value in _leaves(config) if value == "auto"]
    if left:
        raise UsageError(f'{source}: nothing decides {", ".join(left)}, which is "auto"; give a value')
    return config


def checks_gradients(config: dict[str, Any], precision: str | None = None) -> bool:
    """Whether the engine takes the gradient's norm, clips it and leaves out steps that are not finite, on the device.

    DeepSpeed does each of these on the host, which then waits for the device several times a step. It can be told not
    to (zero_optimization.compute_grad_norm, bf16.check_grad_overflow) without ZeRO in fp32, and in ZeRO 1 (fp32) and 2
    (fp32, bf16) without offload. precision: of a configuration that does not say it yet.
    """
    zero = config.get("zero_optimization", {})
    if precision is None:
        enabled = [kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled")]
        precision = enabled[0] if enabled else "fp32"
    exact = {0: ("fp32",), 1: ("fp32",), 2: ("fp32", "bf16")}.get(zero.get("stage", 0), ())
    return precision in exact and "offload_optimizer" not in zero


def _leaves(tree: dict[str, Any], prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _around(choices: list[int], wanted: int) -> list[int]:
    """The up to four choices nearest to what was wanted, in order."""
    return sorted(sorted(choices, key=lambda c: abs(c - wanted))[:4])


def _listed(numbers: list[int]) -> str:
    *rest, last = [str(n) for n in numbers]
    return f"{', '.join(rest)} or {last}" if rest else last
