"""What planning expects of a start, the time of a step and the memory, and how far off that was."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data_pipeline.batch_layout import BatchLayout
from data_pipeline.dali_graph import decoding_device
from data_pipeline.json_object import read_object
from mae_scale.config.schema import Recipe
from mae_scale.distributed.ranks import ranks_per_node
from mae_scale.engines.deepspeed_config import deepspeed_config
from mae_scale.engines.policy import compiles, precision_of
from mae_scale.planning.collectives import Cluster
from mae_scale.planning.hardware import DEFAULT_LINK, gpu_of_device, link_named
from mae_scale.planning.memory import LIVE, PERSISTENT, Setting, memory_of
from mae_scale.planning.rates import Rates, calibrated, cpu_rates, measured_rates, rates_of
from mae_scale.planning.step_time import step_time
from mae_scale.tracking.metrics_log import after_warm_up
from mae_scale.training.context import RunContext
from mae_scale.training.task import Task

STEP_TIME, MEMORY = "plan/step_time_s", "plan/memory_gib"
TAKEN = {STEP_TIME: "perf/step_time_s", MEMORY: "memory/peak_gib"}
"""What is measured of what is planned."""
MEASURED = (*TAKEN.values(), "perf/data_wait_s")
"""What a row must have for it."""


def setting_of(recipe: Recipe, layout: BatchLayout, *, gpu: bool, decodes: bool) -> Setting:
    """Return a recipe's setting for DeepSpeed. decodes: whether images are decoded on the GPU.

    The sizes that a file of the user's own leaves out (engine.config) are DeepSpeed's.
    """
    zero = deepspeed_config(recipe, layout, gpu=gpu)["zero_optimization"]
    stage = int(zero.get("stage", 0))
    return Setting(
        ranks=layout.world_size,
        zero_stage=stage,
        precision=precision_of(recipe, gpu),
        micro_batch=layout.micro_batch,
        accumulation=layout.accumulation,
        checkpointing=recipe.engine.activation_checkpointing,
        offload="offload_optimizer" in zero,
        compiled=compiles(recipe, stage, gpu),
        decodes=decodes,
        bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        persistent=int(zero.get("stage3_param_persistence_threshold", PERSISTENT)),
        live=int(zero.get("stage3_max_live_parameters", LIVE)),
    )


def check_rates(recipe: Recipe, *, gpu: bool) -> None:
    """Raise UsageError when tracking.rates cannot be read, or has not what planning takes."""
    if recipe.tracking.rates is not None:
        found, source = _measured(recipe)
        measured_rates(found, source) if gpu else cpu_rates(found, source)


def planned(task: Task[Any], context: RunContext) -> dict[str, float]:
    """Return plan/step_time_s and plan/memory_gib of a start, as far as they are known.

    Time takes a GPU of hardware.yaml, or tracking.rates; waiting for images is not in it. Memory is what torch
    allocates on a GPU. Neither is known of FairScale's engines.
    """
    recipe, gpu = context.recipe, context.device.type == "cuda"
    if recipe.engine.backend != "deepspeed":
        return {}
    rates = _rates(recipe, context.device)
    if rates is None and not gpu:
        return {}
    work = task.workload(task.number_of_classes(context.index))
    setting = setting_of(recipe, context.layout, gpu=gpu, decodes=decoding_device(recipe.data.device) != "cpu")
    found = {}
    if rates is not None:
        per_node = ranks_per_node(context.ranks.world_size)
        cluster = Cluster(max(1, context.ranks.world_size // per_node), per_node)
        found[STEP_TIME] = step_time(work, setting, cluster, rates).total
    if gpu:
        found[MEMORY] = memory_of(work, setting).allocated / 2**30
    return found


def _rates(recipe: Recipe, device: torch.device) -> Rates | None:
    """Return the rates of this start's devices; None where neither their data sheet nor tracking.rates tells them."""
    known = recipe.tracking.rates is not None
    if device.type != "cuda":
        return cpu_rates(*_measured(recipe)) if known else None
    sheet, precision = gpu_of_device(torch.cuda.get_device_name(device)), precision_of(recipe, gpu=True)
    if sheet is None or precision not in sheet.tflops:
        return None
    rates = rates_of(sheet, link_named(DEFAULT_LINK), link_named(sheet.link), precision)
    return calibrated(rates, *_measured(recipe)) if known else rates


def _measured(recipe: Recipe) -> tuple[dict[str, Any], str]:
    """Return the content of tracking.rates, and what errors call it."""
    assert recipe.tracking.rates is not None
    source = f"tracking.rates={recipe.tracking.rates}"
    return read_object(recipe.tracking.rates, source), source


def over_plan(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return (planned, taken) of the newest start by plan/step_time_s and plan/memory_gib, where it was planned.

    rows: of the run's metrics.jsonl. The time of a step is the median after the warm-up, without waiting for images;
    memory is the peak.
    """
    begins = [number for number, row in enumerate(rows) if STEP_TIME in row or MEMORY in row]
    if not begins:
        return {}
    own, found = rows[begins[-1] :], {}
    settled = after_warm_up(own, own[0]["step"] - 1)
    if STEP_TIME in own[0] and settled:
        took = statistics.median(row["perf/step_time_s"] - row["perf/data_wait_s"] for row in settled)
        found[STEP_TIME] = (own[0][STEP_TIME], took)
    if MEMORY in own[0]:
        found[MEMORY] = (own[0][MEMORY], max(row["memory/peak_gib"] for row in own))
    return found


def over_plan_line(found: Mapping[str, tuple[float, float]]) -> str:
    """Return a line on how far off the plan was; empty where nothing was planned."""
    said = []
    if STEP_TIME in found:
        plan, took = found[STEP_TIME]
        said.append(f"{1000 * plan:,.1f} ms per step, took {1000 * took:,.1f} ms ({_more(took / plan)})")
    if MEMORY in found:
        plan, took = found[MEMORY]
        said.append(f"{plan:.1f} GiB, took {took:.1f} GiB ({_more(took / plan)})")
    return f"planned: {'; '.join(said)}" if said else ""


def _more(ratio: float) -> str:
    return f"{abs(ratio - 1):.0%} {'more' if ratio >= 1 else 'less'}"
