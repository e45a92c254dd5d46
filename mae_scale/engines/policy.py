"""Decisions from a recipe for its engine: name, precision, compilation, batch layout; the combinations refused."""

from data_pipeline.batch_layout import BatchLayout, batch_layout
from data_pipeline.errors import UsageError
from mae_scale.config.schema import Recipe
from mae_scale.engines.deepspeed_templates import zero_stage_of


def engine_name(recipe: Recipe) -> str:
    """Return the name of the recipe's engine in logs and checkpoints."""
    stage = zero_stage_of(recipe)
    if recipe.engine.backend == "fairscale":
        return "fairscale " + ("fully sharded" if stage == 3 else "OSS with DDP")
    return f"deepspeed ZeRO {stage}"


def precision_of(recipe: Recipe, gpu: bool) -> str:
    """Return fp32, bf16 or fp16: the recipe's precision, else bf16 with a GPU and fp32 without."""
    return recipe.engine.precision or ("bf16" if gpu else "fp32")


def compiles(recipe: Recipe, stage: int, gpu: bool) -> bool:
    """Return whether blocks are compiled: as the recipe says, else with a GPU wherever that is known to be correct."""
    wrong = stage == 3 or recipe.engine.activation_checkpointing == "offload"
    return (gpu and not wrong) if recipe.engine.compile is None else recipe.engine.compile


def layout_of(recipe: Recipe, world_size: int) -> BatchLayout:
    """Return the layout of the recipe's global batch over the ranks; raise as `batch_layout` does."""
    return batch_layout(recipe.data.global_batch, world_size, recipe.engine.micro_batch)


def refuse_wrong_combinations(recipe: Recipe, *, gpu: bool) -> None:
    """Raise UsageError, with the reason, for what would fail or be wrong without an error."""
    for found, reason in (*_of_any_engine(recipe, gpu), *_of_deepspeed(recipe), *_of_fairscale(recipe, gpu)):
        if found:
            raise UsageError(reason)


Refusals = list[tuple[bool, str]]
"""Pairs of the presence of a combination and the reason for its refusal."""


def _of_any_engine(recipe: Recipe, gpu: bool) -> Refusals:
    engine = recipe.engine
    return [
        (
            precision_of(recipe, gpu) == "fp16" and not gpu,
            "engine.precision=fp16 needs a GPU: on a CPU DeepSpeed has no fp16; use fp32 or bf16",
        ),
        (
            bool(engine.compile) and engine.activation_checkpointing == "offload",
            "engine.compile=true with engine.activation_checkpointing=offload would run the blocks uncompiled; "
            "use activation_checkpointing=all, or engine.compile=false",
        ),
        (
            recipe.data.device == "gpu" and not gpu,
            "data.device=gpu: no GPU is visible here; use data.device=auto or cpu",
        ),
    ]


def _of_deepspeed(recipe: Recipe) -> Refusals:
    engine, stage = recipe.engine, zero_stage_of(recipe)
    if engine.backend != "deepspeed":
        return []
    return [
        (
            bool(engine.compile) and stage == 3,
            "engine.compile=true with ZeRO 3 loses gradients without an error (losses off by 0.07 and more); "
            "use engine.zero_stage=2, or engine.compile=false",
        ),
        (
            engine.offload and stage != 3 and engine.config is None,
            f"engine.offload=true needs engine.zero_stage=3, found {stage}; for another stage copy a file of "
            "ds_configs, add offload_optimizer to it and pass it as engine.config=PATH",
        ),
        (
            recipe.optim.name == "lars" and stage != 0,
            f"optim.name=lars with ZeRO {stage} would take a rank's part of all weights for one layer, and scale it "
            "wrongly without an error; use engine.zero_stage=0 (linear probing trains the head alone)",
        ),
    ]


def _of_fairscale(recipe: Recipe, gpu: bool) -> Refusals:
    engine, stage = recipe.engine, zero_stage_of(recipe)
    if engine.backend != "fairscale":
        return []
    return [
        (
            engine.config is not None,
            "engine.config is a DeepSpeed file and engine.backend=fairscale does not read it; drop one of them",
        ),
        (
            engine.offload,
            "engine.offload is DeepSpeed's; with engine.backend=fairscale use activation_checkpointing=offload",
        ),
        (
            precision_of(recipe, gpu) == "fp16",
            "engine.precision=fp16 with engine.backend=fairscale is not supported; use bf16, or backend=deepspeed",
        ),
        (
            stage not in (1, 3),
            f"engine.backend=fairscale has zero_stage 1 (sharded optimiser with DDP) and 3 (fully sharded, GPU "
            f"only), found {stage}; its stage 2 (ShardedDataParallel) gives wrong gradients without an error",
        ),
        (
            stage == 3 and not gpu,
            "engine.backend=fairscale with zero_stage=3 (fully sharded) needs a GPU; "
            "use zero_stage=1, or backend=deepspeed, whose ZeRO 3 runs on a CPU too",
        ),
        (
            stage == 3 and bool(engine.compile),
            "engine.compile=true with FairScale's fully sharded engine has not been shown to be right; use false",
        ),
        (
            recipe.classifier is not None and recipe.classifier.ema is not None,
            "classifier.ema with engine.backend=fairscale is not supported; use backend=deepspeed",
        ),
        (
            stage == 3 and recipe.moco is not None,
            "task: moco with FairScale's fully sharded engine has not been shown to be right; use zero_stage=1, or "
            "backend=deepspeed",
        ),
    ]
