"""From a recipe to what the engine is given: batch layout, the complete DeepSpeed file, and what is refused."""

import json
from dataclasses import dataclass
from pathlib import Path

from mae_scale.errors import UsageError
from mae_scale.packaged import packaged
from mae_scale.recipe import Recipe


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


def engine_name(recipe: Recipe) -> str:
    """What the recipe's engine is called in logs and checkpoints."""
    stage = zero_stage_of(recipe)
    if recipe.engine.backend == "fairscale":
        return "fairscale " + ("fully sharded" if stage == 3 else "OSS with DDP")
    return f"deepspeed ZeRO {stage}"


def precision_of(recipe: Recipe, gpu: bool) -> str:
    """fp32, bf16 or fp16: the recipe's, else bf16 with a GPU and fp32 without."""
    return recipe.engine.precision or ("bf16" if gpu else "fp32")


def compiles(recipe: Recipe, stage: int, gpu: bool) -> bool:
    """Whether blocks are compiled: the recipe's word, else with a GPU wherever it is known to be right."""
    wrong = stage == 3 or recipe.engine.activation_checkpointing == "offload"
    return (gpu and not wrong) if recipe.engine.compile is None else recipe.engine.compile


def deepspeed_config(recipe: Recipe, layout: BatchLayout, *, gpu: bool) -> dict:
    """The complete DeepSpeed configuration: ds_configs/zeroN.json or engine.config, every "auto" filled in.

    A file of the user's own decides the ZeRO stage. Raises UsageError where it contradicts the recipe.
    """
    config, source = _read_template(recipe)
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


def checks_gradients(config: dict, precision: str | None = None) -> bool:
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


def zero_stage_of(recipe: Recipe) -> int:
    """The ZeRO stage that will run: engine.config's where there is one, else engine.zero_stage."""
    if recipe.engine.config is None:
        return recipe.engine.zero_stage
    config, _ = _read_template(recipe)
    return int(config.get("zero_optimization", {}).get("stage", 0))


def refuse_wrong_combinations(recipe: Recipe, *, gpu: bool) -> None:
    """UsageError, with the reason, for what would fail or be wrong without an error."""
    engine, stage = recipe.engine, zero_stage_of(recipe)
    precision, fairscale = precision_of(recipe, gpu), engine.backend == "fairscale"
    refusals = [
        (
            precision == "fp16" and not gpu,
            "engine.precision=fp16 needs a GPU: on a CPU DeepSpeed has no fp16; use fp32 or bf16",
        ),
        (
            bool(engine.compile) and stage == 3 and not fairscale,
            "engine.compile=true with ZeRO 3 loses gradients without an error (losses off by 0.07 and more); "
            "use engine.zero_stage=2, or engine.compile=false",
        ),
        (
            bool(engine.compile) and engine.activation_checkpointing == "offload",
            "engine.compile=true with engine.activation_checkpointing=offload would run the blocks uncompiled; "
            "use activation_checkpointing=all, or engine.compile=false",
        ),
        (
            engine.offload and stage != 3 and engine.config is None,
            f"engine.offload=true needs engine.zero_stage=3, found {stage}; for another stage copy a file of "
            "ds_configs, add offload_optimizer to it and pass it as engine.config=PATH",
        ),
        (
            fairscale and engine.config is not None,
            "engine.config is a DeepSpeed file and engine.backend=fairscale does not read it; drop one of them",
        ),
        (
            fairscale and engine.offload,
            "engine.offload is DeepSpeed's; with engine.backend=fairscale use activation_checkpointing=offload",
        ),
        (
            fairscale and precision == "fp16",
            "engine.precision=fp16 with engine.backend=fairscale is not supported; use bf16, or backend=deepspeed",
        ),
        (
            fairscale and stage not in (1, 3),
            f"engine.backend=fairscale has zero_stage 1 (sharded optimiser with DDP) and 3 (fully sharded, GPU "
            f"only), found {stage}; its stage 2 (ShardedDataParallel) gives wrong gradients without an error",
        ),
        (
            fairscale and stage == 3 and not gpu,
            "engine.backend=fairscale with zero_stage=3 (fully sharded) needs a GPU; "
            "use zero_stage=1, or backend=deepspeed, whose ZeRO 3 runs on a CPU too",
        ),
        (
            fairscale and stage == 3 and bool(engine.compile),
            "engine.compile=true with FairScale's fully sharded engine has not been shown to be right; use false",
        ),
        (
            recipe.optim.name == "lars" and stage != 0 and not fairscale,
            f"optim.name=lars with ZeRO {stage} would take a rank's part of all weights for one layer, and scale it "
            "wrongly without an error; use engine.zero_stage=0 (linear probing trains the head alone)",
        ),
        (
            fairscale and recipe.classifier is not None and recipe.classifier.ema is not None,
            "classifier.ema with engine.backend=fairscale is not supported; use backend=deepspeed",
        ),
        (
            recipe.data.device == "gpu" and not gpu,
            "data.device=gpu: no GPU is visible here; use data.device=auto or cpu",
        ),
    ]
    for found, reason in refusals:
        if found:
            raise UsageError(reason)


def _read_template(recipe: Recipe) -> tuple[dict, str]:
    engine = recipe.engine
    if engine.config is None:
        name = "zero3_offload" if engine.offload else f"zero{engine.zero_stage}"
        return json.loads((packaged("ds_configs") / f"{name}.json").read_text()), name
    path = Path(engine.config)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"engine.config={path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"engine.config={path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise UsageError(
            f"engine.config={path} holds a {type(config).__name__}, expected an object of DeepSpeed's keys"
        )
    return config, f"engine.config={path}"


def _leaves(tree: dict, prefix: str = ""):
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
