"""The time of a training step on one GPU, from formulas, by part."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from mae_scale.planning.collectives import Cluster, all_gather_s, all_reduce_s
from mae_scale.planning.memory import Setting, checkpointed_blocks
from mae_scale.planning.rates import Rates
from mae_scale.planning.workload import Workload

FORWARD_VALUES, BACKWARD_VALUES = 17, 33
"""Values per token and channel that a compiled block reads and writes outside of products and attention.

Forward: two norms (2, and 1 fused with the residual), residuals (3 + 3), GELU (4 + 4). Backward: GELU (4 + 4 + 4),
norms and residuals (12), sums over rows for the biases (9).
"""
OTHER_VALUES = 8
"""Assumed: values read and written, forward and backward, for each that a model without blocks keeps."""
UNCOMPILED = 1.6
"""Assumed: how much more an uncompiled block reads and writes."""
ATTENTION_BACKWARD = 2.5
"""FLOPs of fused attention's backward pass over its forward pass: five products in place of two."""
ADAM_BYTES = 28
"""Per parameter: weight, gradient and two moments read, weight and moments written, in float32."""
HOST_ADAM_BYTES_PER_S = 50e9
"""Assumed: memory bandwidth of a host for its ranks' AdamW, with offload."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part; communication is what is not hidden behind the backward pass."""

    products: float
    attention: float
    elementwise: float
    optimizer: float
    communication: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return sum(getattr(self, field.name) for field in fields(self))


def step_time(work: Workload, setting: Setting, cluster: Cluster, rates: Rates) -> StepTime:
    """Return the time of a step: `accumulation` micro-batches, then the optimiser."""
    products = _products(work, setting, rates)
    attention = _attention(work, setting, rates)
    elementwise = _elementwise(work, setting, rates)
    passes = setting.accumulation
    compute = passes * (products + attention + elementwise)
    return StepTime(
        products=passes * products,
        attention=passes * attention,
        elementwise=passes * elementwise,
        optimizer=_optimizer(work, setting, cluster, rates),
        communication=_communication(work, setting, cluster, rates, compute),
    )


def _products(work: Workload, setting: Setting, rates: Rates) -> float:
    """Return the seconds of a micro-batch's matrix products: forward, recomputed, and two per product backward."""
    seconds = 0.0
    for m, k, n, trained in work.other_products:
        seconds += (3 if trained else 1) * rates.product_s(setting.micro_batch * m, k, n)
    for stack, again in checkpointed_blocks(work, setting):
        times = stack.depth + again + 2 * stack.trained
        seconds += times * sum(rates.product_s(setting.micro_batch * m, k, n) for m, k, n in stack.products)
    return seconds


def _attention(work: Workload, setting: Setting, rates: Rates) -> float:
    seconds = 0.0
    for stack, again in checkpointed_blocks(work, setting):
        times = stack.depth + again + ATTENTION_BACKWARD * stack.trained
        seconds += rates.attention_s(
            setting.micro_batch * times * stack.attention_flops, stack.tokens // stack.sequences
        )
    return seconds


def _elementwise(work: Workload, setting: Setting, rates: Rates) -> float:
    kept = 0 if work.stacks else setting.value_bytes * work.kept_values + work.kept_bytes
    size = float(setting.micro_batch * OTHER_VALUES * kept)
    for stack, again in checkpointed_blocks(work, setting):
        values = FORWARD_VALUES * (stack.depth + again) + BACKWARD_VALUES * stack.trained
        size += setting.micro_batch * values * stack.tokens * stack.width * setting.value_bytes
    return (1 if setting.compiled else UNCOMPILED) * size / rates.elementwise_bytes_per_s


def _optimizer(work: Workload, setting: Setting, cluster: Cluster, rates: Rates) -> float:
    """Return the seconds of AdamW on the rank's share, and of the sums of gradients over micro-batches."""
    own = work.trained / (1 if setting.zero_stage == 0 else setting.ranks)
    if setting.offload:
        moved = 2 * (4 + setting.value_bytes) * own / rates.host_bytes_per_s
        return moved + ADAM_BYTES * own * cluster.gpus_per_node / HOST_ADAM_BYTES_PER_S
    size = (ADAM_BYTES + 4 + setting.value_bytes) * own  # the norm reads the gradient, the weights are written again
    added = work.trained if setting.zero_stage < 2 else own
    size += setting.accumulation * (8 + setting.value_bytes) * added
    return size / rates.optimizer_bytes_per_s


def _communication(work: Workload, setting: Setting, cluster: Cluster, rates: Rates, compute: float) -> float:
    """Return the seconds of collectives that the backward pass does not hide.

    ZeRO 1 reduces once per step, after the last backward pass. ZeRO 2 reduces each micro-batch's gradient while its
    backward pass runs, all but the last bucket, for which the next forward pass waits. ZeRO 3 also gathers the weights
    for each forward and backward pass, ahead of their use; those that stay (up to `live` elements) once per step. Its
    last bucket is not hidden either.
    """
    size = setting.value_bytes * work.trained
    buckets = max(1, math.ceil(work.trained / setting.bucket))
    if setting.zero_stage <= 1:  # ZeRO 1: a reduce-scatter, then an all-gather of the weights
        return all_reduce_s(size, cluster, rates, messages=buckets)
    scattered = all_gather_s(size, cluster, rates, messages=buckets)  # once per micro-batch
    if setting.zero_stage == 2:
        backward = compute * 2 / 3 / setting.accumulation
        exposed = max(scattered - backward * (1 - 1 / buckets), scattered / buckets)
        return setting.accumulation * exposed + all_gather_s(size, cluster, rates, messages=buckets)
    gathers = 1 if work.trained <= setting.live else 2 * setting.accumulation
    gathered = gathers * all_gather_s(size, cluster, rates, messages=len(work.parameters))
    scattered *= setting.accumulation
    return max(scattered / buckets, scattered + gathered - compute)
