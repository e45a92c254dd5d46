"""What does an engine's step spend its time in, and where does the host wait for the GPU?

    python bench/profile_step.py [--size huge] [--micro-batch 128] [--zero-stage 1] [--json profile.json]

Three steps of bench/engine.py's engine under torch's profiler, by kind of kernel (on a CPU: by kind of operation), and
the share of the time in which no kernel ran; then three with torch.cuda.set_sync_debug_mode("warn"), every warning
grouped by the innermost frames of mae_scale and DeepSpeed. (Named so because `profile` is the standard library's.)
"""

import argparse
import json
import os
import re
import shlex
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from engine import Setting
from loops import engine_loop
from report import machine, show
from sizes import SIZES

from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import ranks_from_environment

STEPS, WARM_UP_STEPS = 3, 3
KINDS = {  # the first that matches a kernel's or operation's name
    "communication": r"nccl|c10d|gloo|all_?reduce|all_?gather|reduce_scatter|broadcast_(coalesced)?$",
    "optimiser": r"adam|lars",
    "attention": r"flash|fmha|attention|sdpa",
    "matrix products": r"gemm|nvjet|cutlass|wgmma|xmma|matmul|splitk|::(mm|addmm|bmm|baddbmm|linear|convolution|mkl)",
    "copies": r"memcpy|memset|copy|catarray|::(cat|clone|contiguous|_to_copy|to)$|direct_copy",
    "elementwise, norms": r"triton|elementwise|norm|reduce|softmax|gelu|vectorized|index|scatter|gather|sort|radix|fill"
    r"|arange|multi_tensor|^aten::",
}
PACKAGES = re.compile(r"(?:^|/)((?:mae_scale|deepspeed)/.*)$")


def kind_of(name: str) -> str:
    """Return the kind of a kernel or of an operation by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of (start, end) spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def time_by_kind(step: Callable[[], object], device: torch.device) -> dict:
    """Profile STEPS steps: {kind: ms a step}, the wall ms a step, the idle share (GPU), the longest names."""
    gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * gpu]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        if gpu:
            torch.cuda.synchronize()
        wall_us = 1e6 * (time.perf_counter() - began)
    names: Counter = Counter()
    spans = []
    for event in profiler.events():
        if not gpu:
            names[event.name] += event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            names[event.name] += event.time_range.elapsed_us()
            spans.append((event.time_range.start, event.time_range.end))
    kinds: Counter = Counter()
    for name, us in names.items():
        kinds[kind_of(name)] += us
    return {
        "wall_ms_per_step": wall_us / STEPS / 1e3,
        "idle_share": 1 - covered(spans) / wall_us if gpu else None,
        "ms_per_step": {kind: us / STEPS / 1e3 for kind, us in kinds.most_common()},
        "longest": [
            {"name": name, "kind": kind_of(name), "ms_per_step": us / STEPS / 1e3} for name, us in names.most_common(40)
        ],
    }


def host_waits(step: Callable[[], object], warn: Callable[[bool], None]) -> list[dict]:
    """Return what made the host wait, as {where, per_step}; warn(True) lets each wait give a warning."""
    places: Counter = Counter()

    def note(message, *_) -> None:
        if "synchroniz" not in str(message):
            return
        found = [(match[1], frame) for frame in traceback.extract_stack() if (match := PACKAGES.search(frame.filename))]
        places[
            " < ".join(f"{file}:{frame.lineno} {frame.name}" for file, frame in reversed(found[-3:])) or "torch"
        ] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        warn(True)
        try:
            for _ in range(STEPS):
                step()
        finally:
            warn(False)
    return [{"where": where, "per_step": count / STEPS} for where, count in places.most_common()]


def main() -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="example: python bench/profile_step.py --size large"
    )
    parser.add_argument("--size", choices=SIZES, default="huge" if gpu else "small")
    parser.add_argument("--micro-batch", type=int, default=128 if gpu else 8)
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    setting = Setting(options.size, options.micro_batch, 1, "bf16" if gpu else "fp32", gpu, "none")
    with process_group(ranks_from_environment(), 600) as device:
        report = {"command": shlex.join(["python", *sys.argv]), **machine(device), "title": setting.title()}
        torch.manual_seed(0)
        loop = engine_loop(setting, device, options.zero_stage)
        for _ in range(WARM_UP_STEPS):
            loop.step()
        report |= time_by_kind(loop.step, device)
        report["host_waits"] = None
        if gpu:
            torch.cuda.synchronize()
            modes = {True: "warn", False: "default"}
            report["host_waits"] = host_waits(loop.step, lambda on: torch.cuda.set_sync_debug_mode(modes[on]))
        loop.close()
    total = sum(report["ms_per_step"].values())
    print(f"{setting.title()}, ZeRO {options.zero_stage}: {report['wall_ms_per_step']:.1f} ms a step (profiled)")
    show(
        ["kind of kernel" if gpu else "kind of operation", "ms a step", "share"],
        [[kind, f"{ms:.2f}", f"{ms / total:.1%}"] for kind, ms in report["ms_per_step"].items()],
    )
    print(f"idle (no kernel runs): {report['idle_share']:.1%} of the time" if gpu else "idle time: no GPU")
    if report["host_waits"] is None:
        print("host waits: no GPU")
    for wait in report["host_waits"] or []:
        print(f"host waits, {wait['per_step']:.1f} a step: {wait['where']}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
