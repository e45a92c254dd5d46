"""How fast is what users run? The engine's step beside a plain loop around the same model, and beside Hugging Face's.

    python bench/engine.py                          # the sizes that fit this machine, CPU or GPU
    python bench/engine.py --sizes huge --micro-batches 32 64 128 256 --zero-stages 1 2 --json huge.json

Three kinds of loop, one model in memory at a time, on images that already lie on the device:
    engine   scale_out() and train_step() as `mae-scale pretrain` calls them, by ZeRO stage
    plain    the same objective and parameter groups in a loop of a dozen lines: in fp32, or in bf16 with fp32 master
             weights and gradients as the engine keeps them (no gradient norm, no check for overflow)
    peer     Hugging Face's ViTMAEForPreTraining, in bf16 by autocast over fp32 weights
Each with fused AdamW, all compiled block by block or none. A lap builds one of them, warms it up, times groups of
steps and frees it, between two timings of a large matrix product. Laps go round by turns (--rounds); ratios are
taken within a round, on a CPU also of CPU time, which a busy machine disturbs less. TFLOP/s are the model's own
FLOPs (mae_scale.planning.flops), without recomputation.
"""

import argparse
import gc
import itertools
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from loops import LR, Loop, engine_loop, peer_loop, plain_loop
from peer import peer_is_installed
from report import machine, show
from sizes import SIZES, training_flops_per_image
from timing import matrix_product, quartiles, seconds

from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import ranks_from_environment

SIZES_OF = {"cpu": ["base"], "cuda": ["large", "huge"]}
MICRO_BATCHES = {"cpu": [8], "cuda": [128]}
ROUNDS = {"cpu": 3, "cuda": 2}
WARM_UP_STEPS = {"cpu": 1, "cuda": 3}
GROUPS, GROUP_S = {"cpu": 3, "cuda": 5}, {"cpu": 0.0, "cuda": 0.5}  # groups of steps timed in a lap; at least a step


@dataclass(frozen=True)
class Setting:
    """What all ways of a comparison have in common."""

    size: str
    micro_batch: int
    accumulation: int
    precision: str
    compiled: bool
    checkpointing: str

    def title(self) -> str:
        steps = f" x {self.accumulation}" if self.accumulation > 1 else ""
        more = ", compiled" * self.compiled + f", checkpointing {self.checkpointing}" * (self.checkpointing != "none")
        return f"{self.size}, micro-batch {self.micro_batch}{steps}, {self.precision}{more}"


@dataclass(frozen=True)
class Way:
    """One contender: how it is made, and how mae_forward_flops counts it."""

    name: str
    make: Callable[[Setting, torch.device], Loop]
    flops: str


def ways_of(options: argparse.Namespace) -> list[Way]:
    """Return the contenders, the plain loop first, so that the ratios are to the first."""
    ways = [Way("plain loop", plain_loop, "fast")]
    timers = (False, True) if options.throughput_timer else (None,)
    for stage, timer in itertools.product(options.zero_stages, timers):
        name = f"engine, ZeRO {stage}" + {None: "", False: ", timer off", True: ", timer on"}[timer]
        ways.append(Way(name, lambda s, d, stage=stage, timer=timer: engine_loop(s, d, stage, timer), "fast"))
    if peer_is_installed():
        ways.append(Way("Hugging Face", peer_loop, "plain"))
    return [way for way in ways if way.name.partition(",")[0] in options.ways]


def lap(setting: Setting, way: Way, device: torch.device) -> dict:
    """Build, warm up, time and free one contender; its figures, or {"state": why there are none}."""
    free(device)
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    try:
        return _lap(setting, way, device, held)
    except torch.OutOfMemoryError:
        return {"state": "out of memory"}
    except Exception as error:  # one contender that does not run shall not cost the figures of the others
        return {"state": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _lap(setting: Setting, way: Way, device: torch.device, held: int) -> dict:
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    loop = way.make(setting, device)
    losses, times, cpu_times = [], [], []

    def step() -> None:
        losses.append(loop.step())

    try:
        seconds(step, WARM_UP_STEPS[device.type], device)
        steps = max(1, round(GROUP_S[device.type] / seconds(step, 1, device))) if gpu else 1
        for _ in range(GROUPS[device.type]):
            cpu = time.process_time()
            times.append(seconds(step, steps, device))
            cpu_times.append((time.process_time() - cpu) / steps)
    finally:
        loop.close()
    compiled = torch._dynamo.utils.counters["frames"]["ok"]
    if setting.compiled and not compiled and not loop.refuses_compilation:
        raise AssertionError("nothing was compiled")
    return {
        "state": "measured",
        "step_s": times,
        "cpu_s": cpu_times,
        "steps_in_a_group": steps,
        "losses": [loss.item() for loss in losses[:4]],
        "compiled_frames": compiled,
        "peak_gib": (torch.cuda.max_memory_allocated() - held) / 2**30 if gpu else None,
    }


def free(device: torch.device) -> None:
    """Give back what the lap before held; compiled blocks refer to themselves."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(settings: list[Setting], ways: list[Way], device: torch.device, options: argparse.Namespace, save) -> list:
    """Run the laps, round by round; save(results) after every one."""
    ends = time.perf_counter() + options.stop_after_s
    product, side = matrix_product(settings[0].precision, device)
    laps: dict[tuple[Setting, str], list[dict]] = {(s, w.name): [] for s in settings for w in ways}
    tflop = 2 * side**3 / 1e12
    for _, setting, way in itertools.product(range(options.rounds), settings, ways):
        if time.perf_counter() > ends:
            print(f"{setting.title()}: {way.name}: left out, {options.stop_after_s:g} s are over", flush=True)
            continue
        before = tflop / seconds(product, 3, device)
        found = lap(setting, way, device)
        free(device)
        found["matrix_tflops_per_s"] = statistics.mean([before, tflop / seconds(product, 3, device)])
        laps[setting, way.name].append(found)
        said = f"{1e3 * statistics.median(found['step_s']):.1f} ms" if found["state"] == "measured" else found["state"]
        print(f"{setting.title()}: {way.name}: {said}", flush=True)
        results = [summary(s, ways, {w.name: laps[s, w.name] for w in ways}, side) for s in settings]
        save(results)
    return results


def summary(setting: Setting, ways: list[Way], laps: dict[str, list[dict]], side: int) -> dict:
    """Gather a setting's laps: figures by way, and ratios of the step times to the first way's."""
    result = asdict(setting) | {"title": setting.title(), "matrix_side": side, "ways": {}, "over_plain_loop": {}}
    good = {name: [f if f["state"] == "measured" else None for f in found] for name, found in laps.items()}
    images = setting.micro_batch * setting.accumulation
    for way in ways:
        rounds = [found for found in good[way.name] if found]
        if not rounds:
            states = [found["state"] for found in laps[way.name]]
            result["ways"][way.name] = {"state": states[0] if states else "left out"}
            continue
        flops = training_flops_per_image(SIZES[setting.size], way.flops)
        times = quartiles([t for found in rounds for t in found["step_s"]])
        shares = [
            images * flops / 1e12 / statistics.median(found["step_s"]) / found["matrix_tflops_per_s"]
            for found in rounds
        ]
        result["ways"][way.name] = {
            "state": "measured",
            "step_s": times,
            "images_per_s": images / times["median"],
            "gflops_per_image": flops / 1e9,
            "tflops_per_s": images * flops / 1e12 / times["median"],
            "matrix_tflops_per_s": statistics.median(found["matrix_tflops_per_s"] for found in rounds),
            "share_of_matrix_product": statistics.median(shares),
            "peak_gib": rounds[0]["peak_gib"],
            "compiled_frames": rounds[0]["compiled_frames"],
            "losses": rounds[0]["losses"],
            "laps": rounds,
        }
    for way in ways:
        pairs = zip(good[way.name], good.get("plain loop", []), strict=False)
        pairs = [(a, b) for a, b in pairs if a and b]
        if pairs and way.name != "plain loop":
            wall, cpu = (
                [statistics.median(a[clock]) / statistics.median(b[clock]) for a, b in pairs]
                for clock in ("step_s", "cpu_s")
            )
            result["over_plain_loop"][way.name] = quartiles(wall) | {"of_rounds": wall, "cpu_time": quartiles(cpu)}
    return result


def print_table(results: list[dict], gpu: bool) -> None:
    head = ["", "step ms (quartiles)", "images/s", "TFLOP/s", "of matrix product", "peak GiB" if gpu else "CPU time"]
    for result in results:
        rows, left_out = [], []
        for name, found in result["ways"].items():
            if found["state"] != "measured":
                left_out.append(f"  {name}: {found['state']}")
                continue
            ratio = result["over_plain_loop"].get(name)
            last = f"{found['peak_gib']:.2f}" if gpu else _more(ratio["cpu_time"]) if ratio else ""
            step = [1e3 * found["step_s"][q] for q in ("median", "lower_quartile", "upper_quartile")]
            row = [name, "{:.1f} ({:.1f}, {:.1f})".format(*step), f"{found['images_per_s']:.1f}"]
            row += [f"{found['tflops_per_s']:.3g}", f"{found['share_of_matrix_product']:.1%}", last]
            rows.append([*row, _more(ratio) if ratio else ""])
        print(result["title"])
        if rows:
            show([*head, "over plain loop (quartiles)"], rows)
        print(*left_out, sep="\n", end="\n" * bool(left_out))
    rates = [w["matrix_tflops_per_s"] for r in results for w in r["ways"].values() if w["state"] == "measured"]
    if rates:
        side, kind = results[0]["matrix_side"], results[0]["precision"]
        print(
            f"matrix product: {min(rates):.3g} to {max(rates):.3g} TFLOP/s, {side} x {side} in {kind}, beside each lap"
        )


def _more(ratio: dict[str, float]) -> str:
    values = (ratio[q] - 1 for q in ("median", "lower_quartile", "upper_quartile"))
    return "{:+.1%} ({:+.1%}, {:+.1%})".format(*values)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="example: python bench/engine.py --sizes base --micro-batches 8 --rounds 5 --json engine.json",
    )
    gpu = torch.cuda.is_available()
    kind = "cuda" if gpu else "cpu"
    names = ("plain loop", "engine", "Hugging Face")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES_OF[kind])
    parser.add_argument("--micro-batches", nargs="+", type=int, default=MICRO_BATCHES[kind], help="images in one pass")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--zero-stages", nargs="+", type=int, choices=(0, 1, 2, 3), default=[1, 2])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16" if gpu else "fp32")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=gpu, help="by default with a GPU")
    parser.add_argument("--checkpointing", default="none", help="none, all, or n (every n-th block)")
    parser.add_argument("--throughput-timer", action="store_true", help="the engine with DeepSpeed's timer off and on")
    parser.add_argument("--ways", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=ROUNDS[kind], help="laps of each way")
    parser.add_argument("--stop-after-s", type=float, default=float("inf"), help="begin no lap after so many seconds")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, after every lap")
    return parser.parse_args()


def main() -> int:
    options = parse()
    settings = [
        Setting(size, batch, options.accumulation, options.precision, options.compile, options.checkpointing)
        for size, batch in itertools.product(options.sizes, options.micro_batches)
    ]
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if not peer_is_installed():
        print("transformers is not installed: no comparison with Hugging Face's model")
    with process_group(ranks_from_environment(), 600) as device:
        about = {"command": shlex.join(["python", *sys.argv]), **machine(device), "lr": LR}

        def save(results: list[dict]) -> None:
            if options.json:
                options.json.write_text(json.dumps(about | {"settings": results}, indent=1) + "\n", encoding="utf-8")

        results = measure(settings, ways_of(options), device, options, save)
    print(f"{about['device']}, {about['threads']} thread(s), torch {about['versions']['torch']}")
    print_table(results, device.type == "cuda")
    states = [way["state"] for result in results for way in result["ways"].values()]
    return int(any(state.startswith("failed") for state in states) or "measured" not in states)


if __name__ == "__main__":
    sys.exit(main())
