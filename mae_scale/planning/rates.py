"""The rates at which a device works, by kind of work: from its data sheet and assumed shares, or measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.errors import UsageError
from mae_scale.planning.hardware import Gpu, Link

PRODUCT_SHARE = 0.8
"""Assumed: share of the peak that a large matrix product reaches."""
COPY_SHARE = 0.85
"""Assumed: share of the memory's bandwidth that elementwise kernels reach."""
LINK_SHARE = 0.8
"""Assumed: share of a link's bandwidth that a collective reaches."""
ATTENTION_SHARE, ATTENTION_TOKENS = 0.5, 700
"""Assumed: fused attention reaches ATTENTION_SHARE x N / (N + ATTENTION_TOKENS) of the peak with N tokens."""
TILE = (128, 256)
"""Rows and columns of a product that a processor computes at a time; the last wave of tiles is not full."""

KINDS = {
    "product_tflops": "large matrix products, TFLOP/s",
    "copy_gb_s": "elementwise work, bytes read and written, GB/s",
    "node_link_gb_s": "collectives within a node, GB/s in one direction",
    "link_gb_s": "collectives between nodes, GB/s of a node in one direction",
}
_FIELDS = {
    "product_tflops": ("product_flops_per_s", 1e12),
    "copy_gb_s": ("copy_bytes_per_s", 1e9),
    "node_link_gb_s": ("node_link_bytes_per_s", 1e9),
    "link_gb_s": ("link_bytes_per_s", 1e9),
}


@dataclass(frozen=True)
class Rates:
    """Rates of one device and its links, in base units."""

    product_flops_per_s: float
    copy_bytes_per_s: float
    node_link_bytes_per_s: float
    node_link_latency_s: float
    link_bytes_per_s: float
    link_latency_s: float
    host_bytes_per_s: float
    """Between the device and the host's memory."""
    processors: int
    """For the last wave of tiles; 0: a CPU, which has none."""
    power_w: float
    measured: frozenset[str] = frozenset()
    """Which of KINDS were measured; the others are assumed."""

    def product_s(self, rows: float, inner: int, outer: int) -> float:
        """Return the seconds of a matrix product [rows, inner] x [inner, outer]."""
        seconds = 2 * rows * inner * outer / self.product_flops_per_s
        if not self.processors:
            return seconds
        waves = math.ceil(rows / TILE[0]) * math.ceil(outer / TILE[1]) / self.processors
        return seconds * math.ceil(waves) / waves

    def attention_s(self, flops: float, tokens: int) -> float:
        """Return the seconds of fused attention over `tokens` tokens."""
        share = ATTENTION_SHARE * tokens / (tokens + ATTENTION_TOKENS) / PRODUCT_SHARE
        return flops / (self.product_flops_per_s * share)


def rates_of(gpu: Gpu, link: Link, node_link: Link, precision: str) -> Rates:
    """Return the assumed rates of a GPU. Raises UsageError when it does not compute in that precision."""
    if precision not in gpu.tflops:
        raise UsageError(
            f"{gpu.name} has no units for {precision}; use engine.precision={next(iter(gpu.tflops))}, or another GPU"
        )
    return Rates(
        product_flops_per_s=PRODUCT_SHARE * 1e12 * gpu.tflops[precision],
        copy_bytes_per_s=COPY_SHARE * 1e9 * gpu.memory_gb_s,
        node_link_bytes_per_s=LINK_SHARE * 1e9 * node_link.gb_s,
        node_link_latency_s=1e-6 * node_link.latency_us,
        link_bytes_per_s=LINK_SHARE * 1e9 * link.gb_s,
        link_latency_s=1e-6 * link.latency_us,
        host_bytes_per_s=LINK_SHARE * 1e9 * (64 if gpu.link in ("nvlink4", "nvlink5", "pcie5") else 32),
        processors=gpu.processors,
        power_w=gpu.power_w,
    )


def calibrated(rates: Rates, measured: dict[str, Any], source: str) -> Rates:
    """Return the rates with those that were measured (keys of KINDS) in place. Raises UsageError for other contents."""
    found: dict[str, float] = {}
    for kind in KINDS.keys() & measured.keys():
        value = measured[kind]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UsageError(f"{source}: {kind} is {value!r}; expected a positive number")
        found[kind] = float(value)
    if not found:
        raise UsageError(f"{source} has none of {', '.join(KINDS)}; make one with mae-scale plan --measure FILE")
    changed: dict[str, Any] = {_FIELDS[kind][0]: _FIELDS[kind][1] * value for kind, value in found.items()}
    return replace(rates, measured=rates.measured | found.keys(), **changed)
