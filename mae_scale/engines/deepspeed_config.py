"""From a recipe to the complete DeepSpeed configuration."""

from collections.abc import Iterator
from typing import Any

from data_pipeline.batch_layout import BatchLayout
from data_pipeline.errors import UsageError
from mae_scale.config.schema import Recipe
from mae_scale.engines.deepspeed_templates import read_template
from mae_scale.engines.policy import precision_of


def deepspeed_config(recipe: Recipe, layout: BatchLayout, *, gpu: bool) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration: ds_configs/zeroN.json or engine.config, every "auto" filled in.

    A file of the user's own decides the ZeRO stage. Raises UsageError where it contradicts the recipe.
    """
    config, source = read_template(recipe)
    config.setdefault("zero_optimization", {"stage": 0})
    _fill_in(config, _decided(config, recipe, layout, gpu), source)
    _fill_in_links(config, layout, gpu)
    _refuse_contents(config, source)
    return config


def _decided(config: dict[str, Any], recipe: Recipe, layout: BatchLayout, gpu: bool) -> dict[tuple[str, ...], Any]:
    """Return the values that the recipe decides, by the path of their keys."""
    precision, stage = precision_of(recipe, gpu), config["zero_optimization"].get("stage", 0)
    ours = checks_gradients(config, precision)
    # Gradients of bf16 weights add up in fp32 wherever DeepSpeed has it, which is in ZeRO 1 to 3.
    accumulate = None if precision != "bf16" else "fp32" if stage else "bf16"
    decided: dict[tuple[str, ...], Any] = {
        ("train_batch_size",): layout.global_batch,
        ("train_micro_batch_size_per_gpu",): layout.micro_batch,
        ("gradient_accumulation_steps",): layout.accumulation,
        ("gradient_clipping",): 0.0 if ours else recipe.optim.clip_grad_norm or 0.0,
        ("bf16", "enabled"): precision == "bf16",
        ("fp16", "enabled"): precision == "fp16",
        ("data_types", "grad_accum_dtype"): accumulate,
    }
    if ours and stage:
        decided["zero_optimization", "compute_grad_norm"] = False
        decided["bf16", "check_grad_overflow"] = False
    return decided


def _fill_in(config: dict[str, Any], decided: dict[tuple[str, ...], Any], source: str) -> None:
    """Replace "auto" and missing keys by what the recipe decides. Raises UsageError where another value stands."""
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


def _fill_in_links(config: dict[str, Any], layout: BatchLayout, gpu: bool) -> None:
    """Set the keys that follow from the number of ranks and the device."""
    zero = config["zero_optimization"]
    if zero.get("overlap_comm") == "auto":
        zero["overlap_comm"] = layout.world_size > 1  # with it DeepSpeed waits for the device after each micro-batch
    for place in ("offload_optimizer", "offload_param"):
        if zero.get(place, {}).get("pin_memory") == "auto":
            zero[place]["pin_memory"] = gpu


def _refuse_contents(config: dict[str, Any], source: str) -> None:
    """Raise UsageError for forbidden sections, and for keys that are still "auto"."""
    for place in ("offload_optimizer", "offload_param"):
        if config["zero_optimization"].get(place, {}).get("device") == "nvme":
            raise UsageError(f"{source} offloads to nvme, from where no checkpoint is written; use device cpu there")
    for forbidden in ("optimizer", "scheduler"):
        if forbidden in config:
            raise UsageError(
                f"{source} has a section '{forbidden}'; the recipe decides it (optim, schedule): remove it"
            )
    left = [key for key, value in _leaves(config) if value == "auto"]
    if left:
        raise UsageError(f'{source}: nothing decides {", ".join(left)}, which is "auto"; give a value')


def checks_gradients(config: dict[str, Any], precision: str | None = None) -> bool:
    """Return whether the engine norms and clips the gradient and skips steps that are not finite, on the device.

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


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
