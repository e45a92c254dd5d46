"""What does it cost a step that all ranks agree on whether to stop? Control.agree beside an exchange that is waited
for.

Local ranks pretend to train (they sleep, as a host does whose GPU is at work); three ways take turns: no exchange, one
that every step waits for, and Control.agree, whose answer comes a step later.

    python bench/agreement.py [--ranks 2 4 8] [--steps 200] [--step-ms 20] [--json FILE]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from report import machine, show

from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.heartbeat import Control
from mae_scale.distributed.ranks import Ranks, free_port

ROUNDS = 5
WAYS = ("none", "waited for", "a step later")


def rank_main(rank: int, ranks: int, port: int, steps: int, step_s: float, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    here = Ranks(rank, ranks, rank)
    with process_group(here, 60), Control(here, 60) as control:
        group = torch.distributed.new_group(backend="gloo")
        flags = torch.zeros(3, dtype=torch.uint8)

        def waited_for() -> None:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=group)

        exchanges = dict(zip(WAYS, (lambda: None, waited_for, lambda: control.agree(False, False, False)), strict=True))
        times = {way: [] for way in WAYS}
        for number in range(ROUNDS + 1):
            for way, exchange in exchanges.items():
                torch.distributed.barrier()
                spent = 0.0
                for _ in range(steps):
                    time.sleep(step_s)
                    began = time.perf_counter()
                    exchange()
                    spent += time.perf_counter() - began
                if number:
                    times[way].append(1e3 * spent / steps)
    if rank == 0:
        Path(out).write_text(json.dumps(times))
    os._exit(0)  # see mae_scale.distributed.ranks.leave


def measure(ranks: int, steps: int, step_s: float) -> dict[str, list[float]]:
    """Milliseconds a step that rank 0 spends in the exchange, a figure a round, by way."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "times.json")
        torch.multiprocessing.spawn(rank_main, (ranks, free_port(), steps, step_s, out), nprocs=ranks)
        return json.loads(Path(out).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=200, help="of a round")
    parser.add_argument("--step-ms", type=float, default=20.0, help="what a step takes without an exchange")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    results = {ranks: measure(ranks, options.steps, options.step_ms / 1e3) for ranks in options.ranks}
    rows = [
        [
            str(ranks),
            *(f"{statistics.median(found[way]):.3f} ({min(found[way]):.3f}-{max(found[way]):.3f})" for way in WAYS),
        ]
        for ranks, found in results.items()
    ]
    show(["ranks", *(f"{way}, ms a step" for way in WAYS)], rows)
    if options.json:
        about = {"command": " ".join(["python", *sys.argv]), **machine(torch.device("cpu"))}
        options.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
