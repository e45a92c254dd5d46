"""Measure the images per second that our loader decodes, alone and beside training, and compare pixels with the CPU's.

    python bench/decoding.py [--images 2048] [--threads 4 8 16] [--size large] [--json decoding.json]

500 x 375 photographs, random resized crop to the model's image size. Rates by number of threads, on the CPU and decoded
on the GPU ("mixed"), alone and while the engine of bench/engine.py trains on a batch of its own for every batch that
is loaded. With a GPU also the decoder's settings (hw_decoder_load, jpeg_fancy_upsampling): rate, distance from the
CPU's pixels in levels of 255, and whether pixels change with the micro-batch.
"""

import argparse
import contextlib
import itertools
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from engine import Setting
from loops import engine_loop
from report import machine, show
from sizes import SIZES

from data_pipeline import dali_graph
from data_pipeline.augment.kinds import augmentation
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import TrainingOrder
from data_pipeline.dali_graph import Decoding, decoding_device
from data_pipeline.index import Index
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from data_pipeline.normalisation import IMAGENET_STD
from data_pipeline.samples import write_photos
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import ranks_from_environment

HW_LOADS = (0.0, 0.65, 1.0)
COMPARED = 64  # images whose pixels are compared
CROP = augmentation("random_resized_crop")


@contextlib.contextmanager
def decoder_options(**options) -> Iterator[None]:
    """Let decoders that are built inside use these options on a GPU."""
    before = dict(dali_graph.MIXED_DECODER)
    dali_graph.MIXED_DECODER.update(options)
    try:
        yield
    finally:
        dali_graph.MIXED_DECODER.clear()
        dali_graph.MIXED_DECODER.update(before)


def images_per_s(loader: ImageLoader, device: torch.device, step: Callable[[], object] | None = None) -> float:
    """Run through a loader once, its first batch not counted; with step() after every batch."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    count, began = 0, 0.0
    with loader:
        for number, batch in enumerate(loader):
            batch.images.to(device, non_blocking=True)
            if step is not None:
                step()
            if number == 0:
                wait()
                began = time.perf_counter()
            else:
                count += len(batch.images)
        wait()
        return count / (time.perf_counter() - began)


def decoded(index: Index, size: int, where: str, micro_batch: int) -> torch.Tensor:
    """Return the first COMPARED images of an epoch, in levels of 255 up to the mean: float32 [n, 3, S, S]."""
    total = min(COMPARED, len(index))
    order = TrainingOrder(batch_layout(total, 1, micro_batch), stop_step=1)
    with ImageLoader(index, order, Decoding(CROP, size, device=where)) as loader:
        images = torch.cat([batch.images.cpu() for batch in loader])
    return images * 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)


def compare_settings(index: Index, size: int, rate: Callable[[str, int], float], threads: int) -> list[dict]:
    """Return rate and pixels by decoder setting; needs a GPU."""
    on_cpu = decoded(index, size, "cpu", COMPARED)
    rows = []
    for load, fancy in itertools.product(HW_LOADS, (True, False)):
        with decoder_options(hw_decoder_load=load, jpeg_fancy_upsampling=fancy):
            whole, parts = (decoded(index, size, "gpu", micro_batch) for micro_batch in (COMPARED, COMPARED // 16))
            error = (whole - on_cpu).abs()
            rows.append(
                {
                    "hw_decoder_load": load,
                    "jpeg_fancy_upsampling": fancy,
                    "images_per_s": rate("gpu", threads),
                    "mean_distance_from_cpu": error.mean().item(),
                    "largest_distance_from_cpu": error.max().item(),
                    "largest_distance_by_micro_batch": (whole - parts).abs().max().item(),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="example: python bench/decoding.py --threads 8 --size huge"
    )
    parser.add_argument("--images", type=int, default=4096 if gpu else 128)
    parser.add_argument("--threads", type=int, nargs="+", default=[4, 8, 16] if gpu else [1, 2])
    parser.add_argument("--size", choices=SIZES, default="large" if gpu else "small", help="the model that trains")
    parser.add_argument("--micro-batch", type=int, default=128 if gpu else 16)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    if options.images < 2 * options.micro_batch:
        parser.error(f"--images must be at least {2 * options.micro_batch}, two batches")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    setting = Setting(options.size, options.micro_batch, 1, "bf16" if gpu else "fp32", gpu, "none")
    image_size = SIZES[options.size].get("image_size", 224)
    mixed = gpu and decoding_device("auto") == "mixed"
    report = {"setting": setting.title(), "images": options.images, "rates": [], "decoder_settings": None}
    with tempfile.TemporaryDirectory() as folder, process_group(ranks_from_environment(), 600) as device:
        report = {"command": shlex.join(["python", *sys.argv]), **machine(device), **report}
        index = build_index(write_photos(Path(folder) / "photos", options.images), progress=False)
        torch.manual_seed(0)
        loop = engine_loop(setting, device, 1)
        loop.step()

        def rate(where: str, threads: int, step: Callable[[], object] | None = None) -> float:
            order = TrainingOrder(batch_layout(options.micro_batch), stop_step=len(index) // options.micro_batch)
            decoding = Decoding(CROP, image_size, device=where, threads=threads)
            return images_per_s(ImageLoader(index, order, decoding), device, step)

        for where, threads in itertools.product(["cpu", *["gpu"] * mixed], options.threads):
            found = {"device": where, "threads": threads, "alone_images_per_s": rate(where, threads)}
            report["rates"].append(found | {"beside_training_images_per_s": rate(where, threads, loop.step)})
        step_began = time.perf_counter()
        for _ in range(5):
            loop.step().item()
        report["training_alone_images_per_s"] = 5 * options.micro_batch / (time.perf_counter() - step_began)
        if mixed:
            report["decoder_settings"] = compare_settings(index, image_size, rate, max(options.threads))
        loop.close()
    print(f"{setting.title()}: {report['training_alone_images_per_s']:.0f} images/s of training alone")
    show(
        ["decoded on", "threads", "images/s alone", "images/s beside training"],
        [
            [f["device"], str(f["threads"]), *(f"{f[k]:.0f}" for k in f if k.endswith("images_per_s"))]
            for f in report["rates"]
        ],
    )
    if mixed:
        head = ["hw_decoder_load, fancy", "images/s", "from the CPU's: mean", "largest", "by micro-batch: largest"]
        show(
            head,
            [
                [f"{f['hw_decoder_load']}, {f['jpeg_fancy_upsampling']}", *(f"{v:.4g}" for v in list(f.values())[2:])]
                for f in report["decoder_settings"]
            ],
        )
    else:
        print("decoding on the GPU, decoder settings, pixels: no GPU" if not gpu else "DALI finds no GPU")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
