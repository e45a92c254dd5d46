"""Measure a rank's images per second when each read takes milliseconds, as over a network.

The loader's own reading and decoding of small images (scikit-learn's digits, so that decoding is not the limit), each
read made slower by a sleep. Two ways in the same run, rounds interleaved, medians shown: 4 reads in flight, and as many
as follow from their latency. CPU time is that of all threads of the process.

    python bench/reads.py [--read-ms 0 1 5 20] [--images 1442] [--rounds 5] [--micro-batch 128] [--json [PATH]]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

from data_pipeline import batches
from data_pipeline.augment.kinds import augmentation
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import TrainingOrder
from data_pipeline.byte_reader import ByteReader
from data_pipeline.dali_graph import Decoding
from data_pipeline.index import Index
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from data_pipeline.read_ahead import ReadAhead
from data_pipeline.samples import write_digits

WAYS = {"fixed: 4": partial(ReadAhead, least=4, most=4), "found from latency": ReadAhead}


class SlowReader(ByteReader):
    """A reader that takes `sleep_s` longer for each read."""

    sleep_s = 0.0

    def read(self, image: int):
        if self.sleep_s:
            time.sleep(self.sleep_s)
        return super().read(image)


def one_round(loader: ImageLoader, read_ms: float, way: str) -> dict[str, float]:
    """Run one epoch; return images per second, CPU milliseconds per image and the most reading threads."""
    batches.ByteReader, batches.ReadAhead = SlowReader, WAYS[way]
    SlowReader.sleep_s = read_ms / 1e3
    count = threads = 0
    cpu, wall = time.process_time(), time.perf_counter()
    for batch in loader:
        count += len(batch.images)
        threads = max(threads, sum(t.name.startswith("mae-scale-read") for t in threading.enumerate()))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"images_per_s": count / wall, "cpu_ms": 1e3 * cpu / count, "threads": threads}


def measure(index: Index, micro_batch: int, read_ms: float, rounds: int) -> dict[str, dict[str, float]]:
    """Return the medians of each way over interleaved rounds, after one that is not counted."""
    steps = len(index) // micro_batch
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    order = TrainingOrder(batch_layout(micro_batch), stop_step=steps)
    decoding = Decoding(augmentation("random_resized_crop"), 32, device="cpu")
    with ImageLoader(index, order, decoding) as loader:
        for number in range(rounds + 1):
            for way in WAYS:
                result = one_round(loader, read_ms, way)
                if number:
                    found[way].append(result)
    return {
        way: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for way, results in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--read-ms", type=float, nargs="+", default=[0, 1, 5, 20])
    parser.add_argument("--images", type=int, default=1442, help="at most 1442")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batch", type=int, default=128)
    parser.add_argument("--json", nargs="?", const="", help="write the numbers (default bench/results/reads-HOST.json)")
    options = parser.parse_args()

    results = {}
    print(f"{'read ms':>7}  {'in flight':<20}{'images/s':>9}{'CPU ms/image':>14}{'threads':>9}")
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(write_digits(Path(folder) / "digits") / "train", progress=False)
        index = index.take(range(min(options.images, len(index))))
        for read_ms in options.read_ms:
            results[read_ms] = measure(index, options.micro_batch, read_ms, options.rounds)
            for way, found in results[read_ms].items():
                print(
                    f"{read_ms:>7g}  {way:<20}{found['images_per_s']:>9.0f}{found['cpu_ms']:>14.3f}"
                    f"{found['threads']:>9.0f}",
                    flush=True,
                )
    if options.json is not None:
        path = Path(options.json or Path(__file__).parent / "results" / f"reads-{platform.node()}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"images": len(index), "micro_batch": options.micro_batch, "rounds": options.rounds}
        about |= {"cpus": os.cpu_count()}
        path.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
