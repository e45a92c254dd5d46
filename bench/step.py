"""How fast is our training step? Ours beside Hugging Face's ViTMAEForPreTraining, in one process, in turn.

    python bench/step.py                                  # the sizes that fit this machine, CPU or GPU
    python bench/step.py --sizes large huge --batch 128 --precision bf16 --json step.json
    python bench/step.py --sizes base --profile           # also the operations that one of our steps spends its time in

Both models get the same size, weights, images and mask noise, the same autocast over float32 weights, scaled-dot-
product attention and fused AdamW with the same groups. A step is forward, backward and update on images that are
already on the device. In every round ours, the peer's and a large square matrix product are timed one after the
other, so that a machine that is slow for a while is slow for all three; medians over the rounds are shown, and of
the rounds' ratios the median and quartiles. MFU is the FLOPs of each one's own way of computing (WAY_OF below) a
second, as a share of that matrix product's rate and, on a known GPU, of its data sheet's.
Needs torch and timm; without transformers ours is timed alone.
"""

import argparse
import gc
import itertools
import json
import math
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
from peer import layers_of, make_peer, peer_is_installed
from report import machine, show
from sizes import SIZES, training_flops_per_image
from timing import matrix_product, print_profile, quartiles, seconds
from torch import nn

from mae_scale.engines.activation_checkpointing import checkpoint_activations
from mae_scale.engines.compilation import compile_blocks
from mae_scale.models.mae import build_mae
from mae_scale.models.vit import resolve_size
from mae_scale.planning.hardware import peak_flops_per_s

BATCHES = {"cpu": {"small": 32, "base": 8, "large": 4, "huge": 2}, "cuda": {"large": 128, "huge": 64}}
VARIANTS = ("plain", "compiled", "checkpointed", "compiled+checkpointed")
DEFAULT_CASES = {
    "cpu": [("small", "plain"), ("base", "plain")],
    "cuda": [("large", "plain"), ("large", "compiled"), *(("huge", variant) for variant in VARIANTS)],
}
WAY_OF = {"ours": "fast", "peer": "plain"}  # way of mae_forward_flops: the peer embeds and predicts every patch
SHORTEST_LAP_S = 0.3
TIMING_S, FEWEST_ROUNDS = 20.0, 5  # without --rounds: rounds until that time is over, and no fewer than these


@dataclass(frozen=True)
class Case:
    """One comparison; variant says what is applied to the blocks of both models."""

    size: str
    variant: str
    batch: int
    precision: str


class Trainee:
    """A model in training on one fixed batch."""

    def __init__(self, model: nn.Module, loss_of: Callable, precision: str, device: torch.device):
        self.model, self._loss_of = model.train(), loss_of
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def loss(self) -> torch.Tensor:
        with self._autocast:
            return self._loss_of(self.model)

    def step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self._optimizer.step()

    def peak_bytes(self) -> int:
        """Of one step on a GPU: weights and optimiser state, and the most that the step holds beside them."""
        self._optimizer.zero_grad(set_to_none=True)
        state = [v for s in self._optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.is_cuda]
        held = sum(
            t.numel() * t.element_size() for t in itertools.chain(self.model.parameters(), self.model.buffers(), state)
        )
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        torch.cuda.synchronize()
        return held + torch.cuda.max_memory_allocated() - before


def make_trainees(case: Case, device: torch.device) -> tuple[dict[str, Trainee], float | None]:
    """Ours and, with transformers, the peer; and by how much their losses differ before the first step."""
    torch.manual_seed(0)
    ours = build_mae(**SIZES[case.size])
    peer = make_peer(ours) if peer_is_installed() else None
    images = torch.randn(case.batch, 3, ours.image_size, ours.image_size).to(device)
    noise = torch.rand(case.batch, ours.patches).to(device)
    trainees = {"ours": Trainee(ours.to(device), lambda model: model(images, noise).loss, case.precision, device)}
    difference = None
    if peer is not None:
        trainees["peer"] = Trainee(
            peer.to(device), lambda model: model(pixel_values=images, noise=noise).loss, case.precision, device
        )
        with torch.no_grad():
            difference = abs(trainees["ours"].loss().item() - trainees["peer"].loss().item())
    for name, trainee in trainees.items():
        blocks = ours.blocks if name == "ours" else layers_of(trainee.model)
        if "compiled" in case.variant:
            compile_blocks(blocks)
        checkpoint_activations(blocks, "all" if "checkpointed" in case.variant else "none")
    return trainees, difference


def measure(case: Case, device: torch.device, rounds: int | None, profile: bool) -> dict:
    """Time one case; a dict for the table and the JSON file."""
    torch.compiler.reset()
    gc.collect()  # compiled blocks of the case before refer to themselves
    trainees, difference = make_trainees(case, device)
    product, side = matrix_product(case.precision, device)
    works = {name: trainee.step for name, trainee in trainees.items()} | {"matrices": product}
    times = {}
    for name, work in works.items():
        seconds(work, 1, device)  # compiles, allocates, chooses kernels
        times[name] = min(1000, math.ceil(SHORTEST_LAP_S / seconds(work, 1, device)))
    times["peer"] = times["ours"]
    laps = {name: [] for name in works}
    began, done = time.perf_counter(), 0
    while done < (rounds or FEWEST_ROUNDS) or (not rounds and time.perf_counter() - began < TIMING_S):
        for name, work in works.items():
            laps[name].append(seconds(work, times[name], device))
        done += 1

    matrices = 2 * side**3 / statistics.median(laps["matrices"])
    sheet = peak_flops_per_s(torch.cuda.get_device_name(device), case.precision) if device.type == "cuda" else None
    result = asdict(case) | {
        "rounds": done,
        "steps_a_round": times["ours"],
        "matrix_side": side,
        "matrix_tflops_per_s": matrices / 1e12,
        "data_sheet_tflops_per_s": sheet and sheet / 1e12,
        "loss_difference": difference,
    }
    for name, trainee in trainees.items():
        step_s = statistics.median(laps[name])
        flops = training_flops_per_image(SIZES[case.size], WAY_OF[name])
        rate = case.batch * flops / step_s
        result[name] = {
            "step_s": step_s,
            "step_s_of_rounds": laps[name],
            "images_per_s": case.batch / step_s,
            "gflops_an_image": flops / 1e9,
            "tflops_per_s": rate / 1e12,
            "mfu_of_matrix_product": rate / matrices,
            "mfu_of_data_sheet": sheet and rate / sheet,
            "peak_gib": trainee.peak_bytes() / 2**30 if device.type == "cuda" else None,
        }
    if "peer" in trainees:
        ratios = [theirs / mine for theirs, mine in zip(laps["peer"], laps["ours"], strict=True)]
        result["times_as_fast"] = quartiles(ratios)
    if profile:
        print_profile(f"ours: {title(case)}", trainees["ours"].step, device)
    return result


def title(case: Case) -> str:
    size = resolve_size(
        **{k: v for k, v in ({"name": None} | SIZES[case.size]).items() if k in ("name", "patch_size", "width")},
        **{k: v for k, v in SIZES[case.size].items() if k in ("depth", "heads")},
    )
    return f"{case.size} ({size.width} x {size.depth}), batch {case.batch}, {case.precision}, {case.variant}"


def print_table(results: list[dict]) -> None:
    gpu = any(result["ours"]["peak_gib"] is not None for result in results)
    sheet = any(result["data_sheet_tflops_per_s"] for result in results)
    head = ["", "step ms", "images/s", "GFLOPs/image", "MFU", *["of data sheet"] * sheet, *["peak GiB"] * gpu]
    head.append("ours beside the peer (quartiles)")
    rows = []
    for result in results:
        case = Case(**{key: result[key] for key in Case.__dataclass_fields__})
        rows.append([title(case), *[""] * (len(head) - 1)])
        for name in WAY_OF:
            if name not in result:
                continue
            found = result[name]
            row = [
                f"  {'ours' if name == 'ours' else 'Hugging Face'}",
                f"{1e3 * found['step_s']:.1f}",
                f"{found['images_per_s']:.1f}",
                f"{found['gflops_an_image']:.1f}",
                f"{found['mfu_of_matrix_product']:.1%}",
            ]
            if sheet:
                row.append(f"{found['mfu_of_data_sheet']:.1%}" if found["mfu_of_data_sheet"] else "")
            if gpu:
                row.append(f"{found['peak_gib']:.2f}")
            fast = result.get("times_as_fast") if name == "ours" else None
            row.append(
                f"{fast['median']:.2f}x as fast ({fast['lower_quartile']:.2f}, {fast['upper_quartile']:.2f})"
                if fast
                else ""
            )
            rows.append(row)
    show(head, rows)
    for kind in sorted({result["precision"] for result in results}):
        found = [
            (result["matrix_tflops_per_s"], result["matrix_side"]) for result in results if result["precision"] == kind
        ]
        (low, side), (high, _) = min(found), max(found)
        rate = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        print(f"100 % MFU: {rate} TFLOP/s, {side} x {side} matrix products in {kind}, timed in between")
    differences = [r["loss_difference"] for r in results if r["loss_difference"] is not None]
    if differences:
        print(f"largest difference of the two losses before the first step: {max(differences):.1e}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="example: python bench/step.py --sizes base --batch 8 --precision fp32 --rounds 7 --json step.json",
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="CPU: small base; GPU: large huge")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="what is applied to the blocks of both models")
    parser.add_argument("--batch", type=int, help="images a step; by default by size and device")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="CPU: fp32; GPU: bf16 by autocast")
    parser.add_argument("--rounds", type=int, help="of ours, peer, matrix product; by default 20 s of them, at least 5")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, help="on a CPU; by default all cores that this process may use")
    parser.add_argument("--profile", action="store_true", help="print a profiler's table of one of our steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    for name in ("batch", "rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible; leave it out to run on the CPU")
    return options


def cases_of(options: argparse.Namespace, kind: str) -> list[Case]:
    chosen = DEFAULT_CASES[kind]
    if options.sizes or options.variants:
        sizes = options.sizes or list(dict.fromkeys(size for size, _ in chosen))
        chosen = list(itertools.product(sizes, options.variants or ["plain"]))
    precision = options.precision or ("bf16" if kind == "cuda" else "fp32")
    return [Case(s, v, options.batch or BATCHES[kind].get(s, 128), precision) for s, v in chosen]


def main() -> int:
    options = parse()
    kind = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    if kind == "cpu":
        torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report = {"command": shlex.join(["python", *sys.argv]), **machine(device), "cases": []}
    threads = f", {report['threads']} thread(s)" if kind == "cpu" else ""
    print(f"{report['device']}{threads}, torch {report['versions']['torch']}")
    if not peer_is_installed():
        print("transformers is not installed: ours alone (pip install 'transformers>=5' for the comparison)")
    for case in cases_of(options, kind):
        print(f"measuring {title(case)} ...", file=sys.stderr, flush=True)
        try:
            found = measure(case, device, options.rounds, options.profile)
        except torch.OutOfMemoryError:
            print(f"{title(case)}: out of GPU memory for both models at once; try a smaller --batch")
            continue
        report["cases"].append(found)
    if not report["cases"]:
        return 1
    print_table(report["cases"])
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
