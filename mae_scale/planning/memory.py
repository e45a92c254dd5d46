"""The memory of a training step on one GPU, from formulas, by part.

What autograd keeps and the temporaries are held to torch's MemTracker (tests/unit/test_memory.py), the states to what
DeepSpeed holds (tests/integration/test_planned_states.py). The data pipeline, the allocator and the CUDA context are
assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from mae_scale.planning.workload import Stack, Workload

BUCKET = 200_000_000
"""Elements of a gradient bucket (ds_configs: reduce_bucket_size)."""
PERSISTENT = 100_000
"""Parameters of at most so many elements are not sharded in ZeRO 3 (ds_configs: stage3_param_persistence_threshold)."""
LIVE = 1_000_000_000
"""Elements that ZeRO 3 keeps gathered (ds_configs: stage3_max_live_parameters)."""
GATHERED = 2**26
"""Elements of a momentum encoder's average that are gathered at a time, of all ranks (engines/momentum.py)."""
CONTEXT = 1.0 * 2**30
"""Assumed: CUDA context, cuBLAS workspace, kernels."""
COMMUNICATION = 1.0 * 2**30
"""Assumed: NCCL's buffers, with more than one rank."""
DECODER = 0.5 * 2**30
"""Assumed: nvJPEG's and DALI's fixed buffers."""
DECODED_IMAGE = 2 * 3 * 500 * 375
"""Assumed: a decoded image of ImageNet's mean size (500 x 375), of which two batches are under way."""
FRAGMENTATION = 0.05
"""Assumed: share of activations and temporaries that the allocator holds unused beside them."""


@dataclass(frozen=True)
class Setting:
    """How a workload is distributed: what may be chosen without a change of what is computed."""

    ranks: int
    zero_stage: int
    precision: str
    """fp32, bf16 or fp16."""
    micro_batch: int
    accumulation: int = 1
    checkpointing: str | int = "none"
    """As engine.activation_checkpointing."""
    offload: bool = False
    compiled: bool = True
    decodes: bool = True
    """Whether images are decoded on the GPU."""
    bucket: int = BUCKET
    persistent: int = PERSISTENT
    live: int = LIVE

    @property
    def value_bytes(self) -> int:
        """Bytes of an activation, a weight, a gradient."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a step, by part."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float
    buckets: float
    data: float
    overhead: float

    @property
    def total(self) -> float:
        """Bytes of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def allocated(self) -> float:
        """Bytes of what torch allocates: without the decoder's, the context's, and what the allocator holds unused."""
        return self.total - self.data - self.overhead


def memory_of(work: Workload, setting: Setting) -> Memory:
    """Return the memory of a step at its peak.

    The peak is the larger of two moments: the end of the forward pass, when all that is kept is there, and the end of
    the backward pass, when all gradients are.
    """
    gathered, gradients = _weights(work, setting), _gradients(work, setting)
    kept, temporary = activations_of(work, setting)
    live, last = first_block_of(work, setting)
    early = 0.0 if _released(setting) else gradients
    if gradients + live + last > early + kept + temporary:
        kept, temporary = live, last
    else:
        gradients = early
    more = COMMUNICATION if setting.ranks > 1 else 0
    return Memory(
        weights=gathered,
        gradients=gradients,
        optimizer=optimizer_bytes(work, setting) * (0 if setting.offload else 1),
        activations=kept,
        temporary=temporary,
        buckets=_buckets(work, setting) + _gathering(work, setting),
        data=(DECODER + setting.micro_batch * (DECODED_IMAGE + 2 * work.image_bytes)) if setting.decodes else 0,
        overhead=CONTEXT + more + FRAGMENTATION * (kept + temporary),
    )


def states_of(work: Workload, setting: Setting) -> float:
    """Return the bytes of weights, master weights, moments, averages and buffers on a rank between two steps."""
    weights = _resting_weights(work, setting) + _gathering(work, setting)
    return weights + _resting_gradients(work, setting) + optimizer_bytes(work, setting)


def host_bytes(work: Workload, setting: Setting) -> float:
    """Return the bytes of a rank's states in the host's memory: with offload weights, gradients, masters, moments."""
    return (16 + setting.value_bytes) * work.trained / setting.ranks if setting.offload else 0


def optimizer_bytes(work: Workload, setting: Setting) -> float:
    """Return the bytes of AdamW's two moments, master weights and average on a rank."""
    own = sum(work.groups) if setting.zero_stage == 0 else _own(work, setting)
    # Without ZeRO fp32 weights are their own masters.
    master = 0 if setting.zero_stage == 0 and setting.precision == "fp32" else 4
    return own * (8 + master + 4 * work.ema)


def activations_of(work: Workload, setting: Setting) -> tuple[float, float]:
    """Return the bytes of what the forward pass keeps for the backward pass, and of the largest temporary then.

    The temporary is the loss's, or that of the last block's backward pass: a checkpointed one is first computed anew,
    and the prediction is gone by then.
    """
    images, others = _image_bytes(work), setting.value_bytes * work.kept_values + work.kept_bytes
    if not work.stacks:
        return setting.micro_batch * (images + others), setting.micro_batch * 16 * work.predicted
    kept = images + others + work.loss.kept * work.predicted
    frozen = 0.0
    for stack, checkpointed in checkpointed_blocks(work, setting):
        block = _block_bytes(stack, setting)
        if not stack.trained:
            frozen = max(frozen, block)
            continue
        inputs = 0 if setting.checkpointing == "offload" else setting.value_bytes * stack.tokens * stack.width
        kept += checkpointed * inputs + (stack.trained - checkpointed) * block
    last = work.stacks[-1]
    value = setting.value_bytes * last.tokens * last.width
    backward: float = 6 * value
    if last.trained and _is_checkpointed(sum(stack.depth for stack in work.stacks) - 1, setting):
        behind = work.loss.kept * work.predicted + min(others, 2 * value)  # what the head and its norm keep is gone
        backward = _block_bytes(last, setting) + 4 * value - behind
    # A frozen block runs before there is anything else to keep.
    temporary = max(work.loss.temporary * work.predicted, backward, images + frozen - kept)
    return setting.micro_batch * kept, setting.micro_batch * temporary


def first_block_of(work: Workload, setting: Setting) -> tuple[float, float]:
    """Return the bytes kept, and of temporaries, while the first trained block runs backward."""
    if not work.stacks:
        return 0.0, 0.0
    first = next((stack for stack in work.stacks if stack.trained), work.stacks[0])
    block, values = _block_bytes(first, setting), setting.value_bytes * first.tokens * first.width
    return setting.micro_batch * (_image_bytes(work) + block), setting.micro_batch * 3 * values


def checkpointed_blocks(work: Workload, setting: Setting) -> list[tuple[Stack, float]]:
    """Return each stack and the number of its trained blocks that are checkpointed."""
    found, blocks = [], 0
    for stack in work.stacks:
        count = sum(_is_checkpointed(i, setting) for i in range(blocks, blocks + stack.depth))
        found.append((stack, min(stack.trained, count)))
        blocks += stack.depth
    return found


def _is_checkpointed(block: int, setting: Setting) -> bool:
    """Return whether a block is checkpointed, by its number among all blocks: with n every n-th, from the first."""
    policy = setting.checkpointing
    return policy != "none" and block % (policy if isinstance(policy, int) else 1) == 0


def _block_bytes(stack: Stack, setting: Setting) -> float:
    """Return the bytes per image that a block keeps; fused attention.

    Per token 16 values per channel (inputs and outputs of two norms, queries, keys, values, attention's output and its
    projection, the MLP's 4 + 4), and 2 where branches are scaled; two norms' deviations and means; a sum per head.
    """
    return stack.tokens * ((18 if stack.scaled else 16) * setting.value_bytes * stack.width + 8 + 4 * stack.heads)


def _image_bytes(work: Workload) -> float:
    """Return the bytes of an image in float32, and of its patches where there are blocks that take them."""
    if not work.stacks:
        return work.image_bytes
    rows, inner, _, _ = work.other_products[0]
    return work.image_bytes + 2 * rows * inner


def _padded(n: int, setting: Setting) -> int:
    """Return the elements of a group as ZeRO 1 and 2 shard it: a multiple of two per rank."""
    return n if setting.zero_stage in (0, 3) else 2 * setting.ranks * math.ceil(n / (2 * setting.ranks))


def _own(work: Workload, setting: Setting) -> int:
    """Return the elements of a rank's share in ZeRO: of each group, in ZeRO 3 of each parameter."""
    if setting.zero_stage == 3:
        return sum(math.ceil(n / setting.ranks) for n in work.parameters)
    return sum(_padded(n, setting) for n in work.groups) // setting.ranks


def _resting_weights(work: Workload, setting: Setting) -> float:
    size = setting.value_bytes
    if setting.zero_stage < 3:
        return size * (sum(_padded(n, setting) for n in work.groups) + work.frozen) + work.buffer_bytes
    shards = _own(work, setting)
    whole = [n for n in work.parameters if n <= setting.persistent] if setting.ranks > 1 else []
    gathered = sum(setting.ranks * math.ceil(n / setting.ranks) for n in whole)
    return size * (shards + gathered + work.frozen) + work.buffer_bytes


def _weights(work: Workload, setting: Setting) -> float:
    """Return the bytes of the weights while they are used: ZeRO 3 gathers up to `live` of them."""
    if setting.zero_stage < 3 or setting.ranks == 1:
        return _resting_weights(work, setting)
    resting = 0 if setting.offload else _own(work, setting)
    block = max((stack.parameters for stack in work.stacks), default=0)
    gathered = min(work.trained, max(setting.live, block))
    return setting.value_bytes * (resting + gathered + work.frozen) + work.buffer_bytes


def _resting_gradients(work: Workload, setting: Setting) -> float:
    """Return the bytes of gradient buffers that stay between two steps."""
    total = sum(_padded(n, setting) for n in work.groups)
    if setting.zero_stage == 3:
        return 4 * _own(work, setting)
    if setting.zero_stage == 1 and setting.precision != "fp32":
        return 4 * total  # the sum in float32 over micro-batches
    return 0


def _gradients(work: Workload, setting: Setting) -> float:
    """Return the bytes of the gradient of a step."""
    total = sum(_padded(n, setting) for n in work.groups)
    if setting.zero_stage == 0:
        return setting.value_bytes * total
    if setting.zero_stage == 1:
        return 4 * total
    return 0 if setting.offload else 4 * _own(work, setting)


def _released(setting: Setting) -> bool:
    """Return whether gradients are there at the end of the backward pass only."""
    return setting.zero_stage in (0, 2) and setting.accumulation == 1


def _buckets(work: Workload, setting: Setting) -> float:
    """Return the bytes of the buffers in which gradients are reduced."""
    if setting.zero_stage == 0 or not work.trained:
        return 0
    if setting.zero_stage == 3:
        return setting.value_bytes * setting.bucket
    overlapping = 2 if setting.zero_stage == 2 and setting.ranks > 1 else 1
    return overlapping * setting.value_bytes * min(work.trained, setting.bucket)


def _gathering(work: Workload, setting: Setting) -> float:
    """Return the bytes of the buffers in which ranks send and receive a momentum encoder's average.

    They hold the longest share of it, which is that of the first rank: what has no average, the predictor, comes last.
    """
    if setting.zero_stage == 0:
        return 0
    if setting.zero_stage == 3:
        longest = sum(math.ceil(n / setting.ranks) for n in work.followers)
    else:
        longest = min(_own(work, setting), sum(work.followers))
    return setting.value_bytes * (1 + setting.ranks) * min(longest, GATHERED // setting.ranks)
