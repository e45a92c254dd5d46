"""How fast is attention in the model's shapes, by backend, and which kernel runs when nobody chooses?

    python bench/attention.py [--batch 128] [--shapes huge large] [--json attention.json]

Queries, keys and values are the views that a transformer block takes of its one projection, [B, N, 3, H, d]; bf16 on
a GPU, fp32 on a CPU. TFLOP/s count two products forward (4 B H N^2 d) and twice that backward.
"""

import argparse
import contextlib
import json
import os
import shlex
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from report import machine, show
from timing import seconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SHAPES = {  # name: [(part, heads, tokens, numbers a head)]
    "tiny": [("encoder", 2, 17, 32), ("decoder", 2, 65, 16)],
    "large": [("encoder", 16, 50, 64), ("decoder", 16, 197, 32)],
    "huge": [("encoder", 16, 65, 80), ("decoder", 16, 257, 32)],
}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
REPEATS = {"cpu": 3, "cuda": 50}


def attend(qkv: torch.Tensor) -> torch.Tensor:
    """qkv [B, N, 3, H, d] -> [B, N, H d], as a block does it."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def measure(shape: tuple[int, int, int], batch: int, device: torch.device) -> dict:
    """Time every backend in one shape (heads, tokens, numbers a head), and name the default's kernels."""
    heads, tokens, dim = shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    qkv = torch.randn(batch, tokens, 3, heads, dim, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(batch, tokens, heads * dim, device=device, dtype=dtype)

    def both(function=attend) -> None:
        qkv.grad = None
        function(qkv).backward(gradient)

    result: dict = {"batch": batch, "heads": heads, "tokens": tokens, "head_dim": dim, "backends": {}, "kernels": {}}
    flops = 4 * batch * heads * tokens**2 * dim
    for name, backend in {"default": None, **BACKENDS}.items():
        with (
            sdpa_kernel(backend) if backend else contextlib.nullcontext(),
            warnings.catch_warnings(record=True) as said,
        ):
            warnings.simplefilter("always")
            try:
                both()
            except RuntimeError as error:
                reasons = [str(warning.message).partition("(Triggered")[0].strip() for warning in said]
                result["backends"][name] = {"unavailable": reasons or [str(error).partition("\n")[0]]}
                continue
            times = REPEATS[device.type]
            with torch.no_grad():
                forward = seconds(lambda: attend(qkv), times, device)
            whole = seconds(both, times, device)
        result["backends"][name] = {
            "forward_us": 1e6 * forward,
            "forward_and_backward_us": 1e6 * whole,
            "tflops_per_s": 3 * flops / whole / 1e12,
        }
    torch.compiler.reset()
    for name, function in {"eager": attend, "compiled": torch.compile(attend, dynamic=False)}.items():
        both(function)
        result["kernels"][name] = kernels(lambda function=function: both(function), device)
    return result


def kernels(work, device: torch.device) -> list[str]:
    """Return the names of the kernels (on a CPU: of the operations) of attention in a call, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cuda":
        found = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        return [e.key for e in sorted(found, key=lambda e: -e.self_device_time_total)]
    found = [e for e in profiler.key_averages() if "scaled_dot_product" in e.key or "bmm" in e.key]
    return [e.key for e in sorted(found, key=lambda e: -e.self_cpu_time_total)]


def main() -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="example: python bench/attention.py --shapes huge --batch 128"
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["huge", "large"])
    parser.add_argument("--batch", type=int, default=128 if gpu else 4)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    device = torch.device("cuda" if gpu else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    report = {"command": shlex.join(["python", *sys.argv]), **machine(device), "shapes": []}
    for size in options.shapes:
        for part, *shape in SHAPES[size]:
            found = measure(tuple(shape), options.batch, device)
            report["shapes"].append({"size": size, "part": part} | found)
            print(f"{size}, {part}: [{options.batch}, {', '.join(map(str, shape))}] (batch, heads, tokens, head)")
            rows = [
                [name, *(f"{f[k]:.1f}" for k in ("forward_us", "forward_and_backward_us")), f"{f['tflops_per_s']:.3g}"]
                for name, f in found["backends"].items()
                if "unavailable" not in f
            ]
            show(["", "forward us", "forward and backward us", "TFLOP/s"], rows)
            for name, f in found["backends"].items():
                if "unavailable" in f:
                    print(f"  {name} is not available: {' '.join(f['unavailable'])[:300]}")
            for name, names in found["kernels"].items():
                print(f"  kernels by default, {name}: {'; '.join(n[:100] for n in names)}")
            print(flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
