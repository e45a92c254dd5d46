"""What do mask tokens in the encoder cost? The paper's headline: time and memory, decoder of 8 blocks and of 1.

    python bench/mask_tokens.py                         # CPU: ViT-L's depth and tokens in an eighth of its width
    python bench/mask_tokens.py --sizes large huge --micro-batch 128 --json mask_tokens.json    # a GPU's default

The engine's own step (ZeRO 1), as in bench/engine.py. He et al., table 2: with mask tokens in the encoder and a decoder
of 8 blocks ViT-L took 42.4 h, without 15.4 h (2.8 times as fast), with a decoder of 1 block 11.6 h (3.7 times);
ViT-H 119.6, 34.5 (3.5) and 29.3 h (4.1).
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from engine import Setting, Way, free, lap
from loops import engine_loop
from report import machine, show
from sizes import SIZES, training_flops_per_image

from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import ranks_from_environment

PAPER = {("large", 8): 2.8, ("large", 1): 3.7, ("huge", 8): 3.5, ("huge", 1): 4.1}


def kinds_of(size: str) -> list[tuple[bool, int]]:
    """Return (mask tokens in the encoder, decoder blocks): the paper's slowest first."""
    depths = dict.fromkeys((SIZES[size].get("decoder_depth", 8), 1))
    return list(itertools.product((True, False), depths))


def measure(size: str, options: argparse.Namespace, device: torch.device) -> dict:
    gpu = device.type == "cuda"
    setting = Setting(size, options.micro_batch, 1, "bf16" if gpu else "fp32", gpu, "none")
    rows = []
    for mask_tokens, depth in kinds_of(size):
        flops = training_flops_per_image(
            SIZES[size] | {"decoder_depth": depth}, "encoder_mask_tokens" if mask_tokens else "fast"
        )
        rows.append({"encoder_mask_tokens": mask_tokens, "decoder_depth": depth, "gflops_per_image": flops / 1e9})
        rows[-1]["laps"] = []
    for _, row in itertools.product(range(options.rounds), rows):
        model = (
            f"model.encoder_mask_tokens={str(row['encoder_mask_tokens']).lower()}",
            f"model.decoder_depth={row['decoder_depth']}",
        )
        way = Way("engine", lambda s, d, model=model: engine_loop(s, d, 1, None, *model), "")
        row["laps"].append(lap(setting, way, device))
        free(device)
    for row in rows:
        good = [found for found in row["laps"] if found["state"] == "measured"]
        row["state"] = "measured" if good else row["laps"][0]["state"]
        if good:
            row["step_s"] = statistics.median(t for found in good for t in found["step_s"])
            row["peak_gib"] = good[0]["peak_gib"]
            row["paper_times_as_fast"] = None if row["encoder_mask_tokens"] else PAPER.get((size, row["decoder_depth"]))
            pairs = [
                statistics.median(slow["step_s"]) / statistics.median(found["step_s"])
                for slow, found in zip(rows[0]["laps"], row["laps"], strict=True)
                if slow["state"] == found["state"] == "measured"
            ]
            row["times_as_fast"] = statistics.median(pairs) if pairs else None
            row["times_fewer_flops"] = rows[0]["gflops_per_image"] / row["gflops_per_image"]
    return {"title": setting.title(), "size": size, "micro_batch": options.micro_batch, "rows": rows}


def print_table(result: dict, gpu: bool) -> None:
    head = ["mask tokens, decoder", "step ms", "GFLOPs/image", "fewer FLOPs", "as fast", "paper", *["peak GiB"] * gpu]
    rows = []
    for row in result["rows"]:
        name = f"{'in' if row['encoder_mask_tokens'] else 'not in'} the encoder, {row['decoder_depth']} block(s)"
        if row["state"] != "measured":
            print(f"{name}: {row['state']}")
            continue
        fast, paper = row["times_as_fast"], row["paper_times_as_fast"]
        cells = [f"{1e3 * row['step_s']:.1f}", f"{row['gflops_per_image']:.2f}", f"{row['times_fewer_flops']:.2f}x"]
        cells += [f"{fast:.2f}x" if fast else "", f"{paper}x" if paper else ""]
        rows.append([name, *cells, *([f"{row['peak_gib']:.1f}"] if gpu else [])])
    print(result["title"])
    if rows:
        show(head, rows)


def main() -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="example: python bench/mask_tokens.py --sizes large --micro-batch 128 --json mask_tokens.json",
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["large", "huge"] if gpu else ["narrow"])
    parser.add_argument("--micro-batch", type=int, default=128 if gpu else 8)
    parser.add_argument("--rounds", type=int, default=1 if gpu else 2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with process_group(ranks_from_environment(), 600) as device:
        report = {"command": shlex.join(["python", *sys.argv]), **machine(device), "results": []}
        for size in options.sizes:
            report["results"].append(measure(size, options, device))
            print_table(report["results"][-1], gpu)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    states = [row["state"] for result in report["results"] for row in result["rows"]]
    return int(any(state.startswith("failed") for state in states) or "measured" not in states)


if __name__ == "__main__":
    sys.exit(main())
