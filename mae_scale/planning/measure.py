"""Measure this device's rates: what `mae-scale plan --calibrate` takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import Ranks, ranks_per_node
from mae_scale.planning.step_time import ADAM_BYTES, ATTENTION_BACKWARD, BACKWARD_VALUES, FORWARD_VALUES, UNCOMPILED

WIDTHS = (64, 128, 256, 512, 1024, 1280)
TOKENS = (17, 50, 65, 197, 257, 1025)
HEAD_DIM = 64
MEETING_S = 120.0
"""Timeout of collectives between the ranks that measure."""
SECONDS = {"cpu": 0.3, "cuda": 0.2}
"""Time that one rate is measured for, at least."""
ROWS = {"cpu": 2048, "cuda": 65536}
ALL_REDUCES = 10
REDUCED = {"cpu": 2**23, "cuda": 200_000_000}
"""Values of an all-reduce: on a GPU a bucket of gradients."""
VALUES = {"cpu": 2**22, "cuda": 2**27}
"""Values that a memory-bound measurement goes over: more than caches hold."""


def measure_machine(ranks: Ranks) -> dict[str, Any]:
    """Return the rates of this rank's GPU in bf16, else of its CPU in float32, and with several ranks of their links.

    All ranks call it, and measure at the same time.
    """
    with process_group(ranks, MEETING_S) if ranks.world_size > 1 else nullcontext(_first_device()) as device:
        found = measure(device, "bf16" if device.type == "cuda" else "fp32")
        if ranks.world_size > 1:
            torch.distributed.barrier()
            found |= measure_links(device, ranks_per_node(ranks.world_size))
    return found


def _first_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(device: torch.device, precision: str) -> dict[str, Any]:
    """Return the device's rates under the keys of `rates.MEASURED`, and what they were measured on.

    Products of the widths of transformer blocks forward and backward; fused attention forward and backward by its
    number of tokens; norm, GELU, residual and attention's copies of a block, counted as planning does, eager, times
    what compiling is assumed to save; fused AdamW.
    """
    kind = device.type
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return {
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else "cpu",
        "device_type": kind,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "product_tflops": {str(width): _product(width, device, dtype) / 1e12 for width in WIDTHS},
        "attention_tflops": {str(tokens): _attention(tokens, device, dtype) / 1e12 for tokens in TOKENS},
        "elementwise_gb_s": UNCOMPILED * _elementwise(device, dtype) / 1e9,
        "optimizer_gb_s": _optimizer(device) / 1e9,
    }


def measure_links(device: torch.device, ranks_per_node: int) -> dict[str, float]:
    """Return the rates of all-reduces within a node and between nodes, where there are several ranks or nodes.

    In 10^9 bytes/s, counted as planning does: a ring's bytes over the time. All ranks of the process group call it.
    """
    found, world_size = {}, torch.distributed.get_world_size()
    nodes = world_size // ranks_per_node
    if ranks_per_node > 1:
        node, _ = torch.distributed.new_subgroups(group_size=ranks_per_node)
        found["node_link_gb_s"] = _all_reduce(device, node) / 1e9
    if nodes > 1:
        found["link_gb_s"] = _all_reduce(device, torch.distributed.group.WORLD) / 1e9
    return found


def _all_reduce(device: torch.device, group: torch.distributed.ProcessGroup | None) -> float:
    """Return bytes/s that a ring over the group's n ranks sends in one direction: 2 S (n - 1) / n over the time."""
    n = torch.distributed.get_world_size(group)
    values = torch.ones(REDUCED[device.type], device=device, dtype=torch.bfloat16 if device.type == "cuda" else None)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    for _ in range(2 + ALL_REDUCES):
        torch.distributed.barrier(group)
        wait()
        began = time.perf_counter()
        torch.distributed.all_reduce(values, group=group)
        wait()
        times.append(time.perf_counter() - began)
    size = values.numel() * values.element_size()
    return 2 * size * (n - 1) / n / statistics.median(times[2:])


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of one call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    work()
    wait()
    ends = time.perf_counter() + SECONDS[device.type]
    while time.perf_counter() < ends or len(times) < 3:
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _product(width: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of a block's MLP products [rows, width] x [width, 4 width], forward and backward."""
    x = torch.randn(ROWS[device.type], width, device=device, dtype=dtype, requires_grad=True)
    layer = nn.Linear(width, 4 * width, device=device, dtype=dtype)
    gradient = torch.randn(len(x), 4 * width, device=device, dtype=dtype)

    def work() -> None:
        x.grad = layer.weight.grad = layer.bias.grad = None
        layer(x).backward(gradient)

    return 3 * 2 * len(x) * width * 4 * width / _seconds(work, device)


def _attention(tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of fused attention, forward and backward, counted as planning does."""
    heads = 4
    batch = max(1, ROWS[device.type] // tokens)
    shape = (batch, heads, tokens, HEAD_DIM)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, device=device, dtype=dtype)

    def work() -> None:
        q.grad = k.grad = v.grad = None
        nn.functional.scaled_dot_product_attention(q, k, v).backward(gradient)

    flops = (1 + ATTENTION_BACKWARD) * 4 * batch * tokens**2 * heads * HEAD_DIM
    return flops / _seconds(work, device)


def _elementwise(device: torch.device, dtype: torch.dtype) -> float:
    """Return bytes/s of what a block does outside of products and attention, counted as planning does."""
    width = 512
    tokens = VALUES[device.type] // 4 // width
    norms = [nn.LayerNorm(width, device=device, dtype=dtype) for _ in range(2)]
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    branch = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    hidden = torch.randn(tokens, 4 * width, device=device, dtype=dtype, requires_grad=True)
    gradient, inner = torch.ones_like(x), torch.ones_like(hidden)
    shares = [torch.ones(1, width // HEAD_DIM, tokens, HEAD_DIM, device=device, dtype=dtype) for _ in range(3)]

    def work() -> None:
        x.grad = branch.grad = hidden.grad = None
        first = x + branch
        second = norms[1](first) + branch
        nn.functional.gelu(hidden).backward(inner)
        (norms[0](x) + second).backward(gradient)
        inner.sum(0)
        torch.stack(shares).permute(1, 3, 0, 2, 4).reshape(tokens, 3 * width)  # gradients of q, k, v, as one

    size = (FORWARD_VALUES + BACKWARD_VALUES) * tokens * width * x.element_size()
    return size / _seconds(work, device)


def _optimizer(device: torch.device) -> float:
    """Return bytes/s of fused AdamW over float32 weights, counted as planning does."""
    weight = nn.Parameter(torch.randn(4 * VALUES[device.type], device=device))
    weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW([weight], lr=1e-4, fused=True)
    return ADAM_BYTES * weight.numel() / _seconds(optimizer.step, device)
