"""Clocks, profiles, the machine's own rate of matrix products, and quartiles."""

import functools
import statistics
import time
from collections.abc import Callable

import torch

SMALLEST_SIDE, LARGEST_SIDE = 256, {"cpu": 2048, "cuda": 8192}
SLOWEST_PRODUCT_S = 1.0


def seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Return the seconds of one call, when called that often."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - began) / times


def matrix_product(precision: str, device: torch.device) -> tuple[Callable[[], object], int]:
    """Return a function that multiplies two square random matrices, and their side.

    The side is large, but the product takes at most about SLOWEST_PRODUCT_S.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = SMALLEST_SIDE
    while True:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        seconds(product, 1, device)
        if side == LARGEST_SIDE[device.type] or 8 * seconds(product, 1, device) > SLOWEST_PRODUCT_S:
            return product, side
        side *= 2


def quartiles(values: list[float]) -> dict[str, float]:
    """Return median, lower and upper quartile; of one value three times that value."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high}


def print_profile(what: str, step: Callable[[], object], device: torch.device) -> None:
    """Print a profiler's table of one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    print(f"one step of {what}")
    print(profiler.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=25))
