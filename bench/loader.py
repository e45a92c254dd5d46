"""Measure the CPU time per image of our loader (DALI) beside torchvision, on 500 x 375 photographs.

Each way reads JPEGs from disk, takes a random resized crop (bicubic with antialias), flips, normalises and batches,
in one process on one decoding thread; one of ours also goes through RandAugment, as in fine-tuning. Rounds of all
ways are interleaved and the medians shown. CPU time is that of all threads of the process, which a busy machine
disturbs less than images per second.

    python bench/loader.py [--images 128] [--rounds 5] [--sizes 224 448] [--json [PATH]]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torchvision import io as tvio
from torchvision.transforms import InterpolationMode, v2

from data_pipeline.augment.kinds import augmentation
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import TrainingOrder
from data_pipeline.dali_graph import Decoding, decoding_device
from data_pipeline.index import Index
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from data_pipeline.samples import write_photos

BATCH = 32


def ours(index: Index, size: int, device: str, kind: str = "random_resized_crop") -> Callable[[], int]:
    """Return a round: one epoch through a loader that is kept."""
    order = TrainingOrder(batch_layout(BATCH), stop_step=len(index) // BATCH)
    loader = ImageLoader(index, order, Decoding(augmentation(kind), size, device=device, threads=1))

    def run() -> int:
        return sum(len(batch.images) for batch in loader)

    return run


def torchvision(index: Index, size: int, tensors: bool) -> Callable[[], int]:
    """Return a round of torchvision: Pillow images, or tensors decoded by torchvision.io."""
    crop = v2.RandomResizedCrop(size, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True)
    to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *([] if tensors else [v2.ToImage()]), *to_float])
    paths = [str(index.path(image)) for image in range(len(index))]

    def load(path: str) -> torch.Tensor:
        if tensors:
            return transform(tvio.decode_jpeg(tvio.read_file(path), mode=tvio.ImageReadMode.RGB))
        with Image.open(path) as image:
            return transform(image.convert("RGB"))

    def run() -> int:
        count = 0
        for first in range(0, len(paths) - BATCH + 1, BATCH):
            count += len(torch.stack([load(path) for path in paths[first : first + BATCH]]))
        return count

    return run


def measure(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, float]]:
    """Return medians over interleaved rounds, after one that is not counted: CPU and wall milliseconds per image."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            count = run()
            spent = time.process_time() - cpu, time.perf_counter() - wall
            if number:
                times[name].append((1e3 * spent[0] / count, 1e3 * spent[1] / count))
    return {
        name: {
            "cpu_ms": statistics.median(cpu for cpu, _ in spent),
            "cpu_ms_lowest": min(cpu for cpu, _ in spent),
            "cpu_ms_highest": max(cpu for cpu, _ in spent),
            "wall_ms": statistics.median(wall for _, wall in spent),
        }
        for name, spent in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448])
    parser.add_argument(
        "--json", nargs="?", const="", help="write the numbers (default bench/results/loader-HOST.json)"
    )
    options = parser.parse_args()
    if options.images < BATCH:
        parser.error(f"--images must be at least {BATCH}, a batch")
    torch.set_num_threads(1)

    results = {}
    print(f"{'size':>4}  {'way':<28}{'CPU ms/image':>13}{'lowest':>8}{'highest':>8}{'wall ms/image':>15}")
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(write_photos(Path(folder) / "photos", options.images), progress=False)
        for size in options.sizes:
            ways = {"ours (DALI, cpu)": ours(index, size, "cpu")}
            ways["ours, RandAugment (cpu)"] = ours(index, size, "cpu", "rand_augment")
            if decoding_device("auto") == "mixed":
                ways["ours (DALI, mixed)"] = ours(index, size, "gpu")
                ways["ours, RandAugment (mixed)"] = ours(index, size, "gpu", "rand_augment")
            ways["torchvision, Pillow"] = torchvision(index, size, tensors=False)
            ways["torchvision.io, tensors"] = torchvision(index, size, tensors=True)
            results[size] = measure(ways, options.rounds)
            for name, found in results[size].items():
                print(
                    f"{size:>4}  {name:<28}{found['cpu_ms']:>13.2f}{found['cpu_ms_lowest']:>8.2f}"
                    f"{found['cpu_ms_highest']:>8.2f}{found['wall_ms']:>15.2f}",
                    flush=True,
                )
    if options.json is not None:
        path = Path(options.json or Path(__file__).parent / "results" / f"loader-{platform.node()}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"images": options.images, "rounds": options.rounds, "cpus": os.cpu_count(), "torch": torch.__version__}
        path.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
