"""The rates at which a device works, by kind of work: from its data sheet and assumed shares, or measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from data_pipeline.errors import UsageError
from mae_scale.planning.hardware import Gpu, Link

PRODUCT_SHARE = 0.8
"""Assumed: share of the peak that a large matrix product reaches."""
COPY_SHARE = 0.85
"""Assumed: share of the memory's bandwidth that elementwise kernels and the optimiser reach."""
LINK_SHARE = 0.8
"""Assumed: share of a link's bandwidth that a collective reaches."""
ATTENTION_SHARE, ATTENTION_TOKENS = 0.5, 700
"""Assumed: fused attention reaches ATTENTION_SHARE x N / (N + ATTENTION_TOKENS) of the peak with N tokens."""
TILE = (128, 256)
"""Rows and columns of a product that a processor computes at a time; the last wave of tiles is not full."""


@dataclass(frozen=True)
class Curve:
    """A positive quantity by a positive one: points by ascending x, between them a power law, beyond them constant."""

    points: tuple[tuple[float, float], ...]

    def at(self, x: float) -> float:
        """Return the value at x."""
        if x <= self.points[0][0]:
            return self.points[0][1]
        for (x0, y0), (x1, y1) in pairwise(self.points):
            if x <= x1:
                return y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0))
        return self.points[-1][1]

    def times(self, factor: float) -> Curve:
        """Return the curve with all its values multiplied."""
        return Curve(tuple((x, factor * y) for x, y in self.points))


@dataclass(frozen=True)
class Rates:
    """Rates of one device and its links, in base units."""

    products: Curve
    """FLOP/s of matrix products, by the smaller of their inner and outer sizes."""
    attention: Curve
    """FLOP/s of fused attention, by its number of tokens."""
    elementwise_bytes_per_s: float
    optimizer_bytes_per_s: float
    node_link_bytes_per_s: float
    """Of collectives within a node, per rank in one direction."""
    node_link_latency_s: float
    link_bytes_per_s: float
    """Of collectives between nodes, per node in one direction."""
    link_latency_s: float
    host_bytes_per_s: float
    """Between the device and the host's memory."""
    processors: int
    """For the last wave of tiles; 0: a CPU, which has none."""
    power_w: float
    measured: frozenset[str] = frozenset()
    """Which of MEASURED were measured; the others are assumed."""
    measured_on: str | None = None
    """Name of the device; None where the file does not say it."""

    def product_s(self, rows: float, inner: int, outer: int) -> float:
        """Return the seconds of a matrix product [rows, inner] x [inner, outer]."""
        seconds = 2 * rows * inner * outer / self.products.at(min(inner, outer))
        if not self.processors:
            return seconds
        waves = math.ceil(rows / TILE[0]) * math.ceil(outer / TILE[1]) / self.processors
        return seconds * math.ceil(waves) / waves

    def attention_s(self, flops: float, tokens: int) -> float:
        """Return the seconds of fused attention over `tokens` tokens."""
        return flops / self.attention.at(tokens)


def _curve(unit: float) -> Callable[[Any], Any]:
    def read(value: Any) -> Curve:
        points = value if isinstance(value, dict) else {"1": value}
        found = sorted((_positive(float(x)), unit * _positive(y)) for x, y in points.items())
        if not found:
            raise ValueError
        return Curve(tuple(found))

    return read


def _rate(unit: float) -> Callable[[Any], Any]:
    return lambda value: unit * _positive(value)


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError
    return float(value)


MEASURED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "product_tflops": ("products", _curve(1e12)),
    "attention_tflops": ("attention", _curve(1e12)),
    "elementwise_gb_s": ("elementwise_bytes_per_s", _rate(1e9)),
    "optimizer_gb_s": ("optimizer_bytes_per_s", _rate(1e9)),
    "node_link_gb_s": ("node_link_bytes_per_s", _rate(1e9)),
    "link_gb_s": ("link_bytes_per_s", _rate(1e9)),
}
"""What a file of measured rates may have, and the rate it sets. The first two: a number, or numbers by size."""
COMPUTING = ("product_tflops", "attention_tflops", "elementwise_gb_s", "optimizer_gb_s")
"""Of these, what a device does by itself."""


def rates_of(gpu: Gpu, link: Link, node_link: Link, precision: str) -> Rates:
    """Return the assumed rates of a GPU. Raises UsageError when it does not compute in that precision."""
    if precision not in gpu.tflops:
        raise UsageError(
            f"{gpu.name} has no units for {precision}; use engine.precision={next(iter(gpu.tflops))}, or another GPU"
        )
    peak, memory = 1e12 * gpu.tflops[precision], 1e9 * gpu.memory_gb_s
    tokens = [2.0**n for n in range(4, 15)]
    return Rates(
        products=Curve(((1.0, PRODUCT_SHARE * peak),)),
        attention=Curve(tuple((n, peak * ATTENTION_SHARE * n / (n + ATTENTION_TOKENS)) for n in tokens)),
        elementwise_bytes_per_s=COPY_SHARE * memory,
        optimizer_bytes_per_s=COPY_SHARE * memory,
        node_link_bytes_per_s=LINK_SHARE * 1e9 * node_link.gb_s,
        node_link_latency_s=1e-6 * node_link.latency_us,
        link_bytes_per_s=LINK_SHARE * 1e9 * link.gb_s,
        link_latency_s=1e-6 * link.latency_us,
        host_bytes_per_s=LINK_SHARE * 1e9 * (64 if gpu.link in ("nvlink4", "nvlink5", "pcie5") else 32),
        processors=gpu.processors,
        power_w=gpu.power_w,
    )


def measured_rates(measured: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the fields of Rates that a file has measured.

    Raises UsageError for values that are not positive numbers, or where the file has none of MEASURED. On a CPU, which
    a file says by "device_type": "cpu", products have no waves of tiles.
    """
    changed: dict[str, Any] = {}
    found = [kind for kind in MEASURED if kind in measured]
    for kind in found:
        field, read = MEASURED[kind]
        try:
            changed[field] = read(measured[kind])
        except (ValueError, TypeError, AttributeError):
            raise UsageError(f"{source}: {kind} is {measured[kind]!r}; expected a positive number") from None
    if not found:
        raise UsageError(f"{source} has none of {', '.join(MEASURED)}; make one with mae-scale plan --measure FILE")
    if measured.get("device_type") == "cpu":
        changed["processors"] = 0
    device = measured.get("device")
    return {**changed, "measured": frozenset(found), "measured_on": None if device is None else str(device)}


def calibrated(rates: Rates, measured: dict[str, Any], source: str) -> Rates:
    """Return the rates with those that were measured in place. Raises UsageError as `measured_rates` does."""
    return replace(rates, **measured_rates(measured, source))


def cpu_rates(measured: dict[str, Any], source: str) -> Rates:
    """Return the rates of a CPU, of which nothing is assumed; what links do is left out where it was not measured.

    Raises UsageError for a file that lacks a rate of computing, or is of a GPU.
    """
    found = measured_rates(measured, source)
    lacks = [kind for kind in COMPUTING if kind not in measured]
    if lacks or found.get("processors") != 0:
        what = f"lacks {', '.join(lacks)}" if lacks else f"is of {measured.get('device', 'a GPU')}"
        raise UsageError(f"{source} {what}; this is a CPU: make one here with mae-scale plan --measure FILE")
    links = {name: math.inf for name in ("node_link_bytes_per_s", "link_bytes_per_s", "host_bytes_per_s")}
    return Rates(**{**links, "node_link_latency_s": 0.0, "link_latency_s": 0.0, "power_w": 0.0, **found})
