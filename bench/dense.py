"""How fast is detection? Our Mask R-CNN beside torchvision's, and our annotated images beside its transforms.

    python bench/dense.py                                              # a small ViT on a CPU, ViT-B on a GPU
    python bench/dense.py --size base --image-size 1024 --precision bf16 --json dense.json
    python bench/dense.py --depth 8 --parts step --profile             # also the operations of one step of each

The step: ours is `MaskRcnn.losses`, in which each image has its own losses; the peer is torchvision's
`MaskRCNN` around the same encoder and pyramid, with heads, anchors, samples and weights as ours, its resizing and
normalisation switched off. Both get the same annotated images, fused AdamW, and the same autocast over float32 weights.
In every round they are timed one after the other; medians over the rounds are shown, and of the rounds' ratios the
median and quartiles. Peak memory is that of a process (a GPU: of torch) with one of the models alone: weights,
optimiser state and what a step holds beside them.

The images: scenes with COCO's JSON, scaled by large-scale jitter to squares of --jitter-size px with their boxes and
masks. The peer decodes with torchvision's CocoDetection and moves everything by its transforms v2, by the same
numbers. CPU time is that of all threads of the process; all ways decode on one thread.
"""

import argparse
import copy
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torchvision
from annotated_images import BATCH, Scenes, TensorImages, ours, torchvisions
from loader import measure
from report import machine, show
from step import Trainee
from timing import print_profile, quartiles, seconds
from torch import nn
from torchvision.datasets import CocoDetection
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from data_pipeline.batches import Batch
from mae_scale.models.dense import DenseEncoder, MapNorm, evenly_placed
from mae_scale.models.detector import BOX_CELLS, LEVELS, MASK_CELLS, Instances, MaskRcnn
from mae_scale.models.vit import SIZES, ViTSize

NAMED = {
    "tiny": ViTSize(patch_size=16, width=32, depth=2, heads=2),
    "small": ViTSize(patch_size=16, width=192, depth=4, heads=3),
    "base": SIZES["vit_base_patch16"],
    "large": SIZES["vit_large_patch16"],
}
CLASSES, WINDOW, PRETRAINING_SIZE = 10, 14, 224


class Backbone(nn.Module):
    """What torchvision's Mask R-CNN takes: a dictionary of maps."""

    def __init__(self, model: MaskRcnn, channels: int):
        super().__init__()
        self.encoder, self.pyramid = copy.deepcopy(model.encoder), copy.deepcopy(model.pyramid)
        self.out_channels = channels

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        return OrderedDict(zip(LEVELS, self.pyramid(self.encoder(images)[0]), strict=True))


def peer_of(model: MaskRcnn, channels: int, image_size: int) -> MaskRCNN:
    """Return torchvision's Mask R-CNN with the size, settings and weights of ours."""
    anchors = model.rpn.anchor_generator
    peer = MaskRCNN(
        Backbone(model, channels),
        min_size=image_size,
        max_size=image_size,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        _skip_resize=True,
        rpn_anchor_generator=AnchorGenerator(
            tuple((int(side),) for side in anchors.sides), (anchors.ratios,) * len(LEVELS)
        ),
        rpn_head=RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2),
        rpn_post_nms_top_n_train=1000,
        box_roi_pool=MultiScaleRoIAlign(LEVELS[:-1], BOX_CELLS, sampling_ratio=2),
        box_head=FastRCNNConvFCHead((channels, BOX_CELLS, BOX_CELLS), [channels] * 4, [4 * channels], MapNorm),
        box_predictor=FastRCNNPredictor(4 * channels, 1 + CLASSES),
        mask_roi_pool=MultiScaleRoIAlign(LEVELS[:-1], MASK_CELLS, sampling_ratio=2),
        mask_head=MaskRCNNHeads(channels, [channels] * 4, dilation=1, norm_layer=MapNorm),
        mask_predictor=MaskRCNNPredictor(channels, channels, 1 + CLASSES),
    )
    peer.rpn.head.load_state_dict(model.rpn.head.head.state_dict())
    for name in ("box_head", "box_predictor", "mask_head", "mask_predictor"):
        getattr(peer.roi_heads, name).load_state_dict(getattr(model.roi_heads, name).head.state_dict())
    return peer


def batch_of(scenes: Scenes, options: argparse.Namespace) -> tuple[torch.Tensor, list[Instances]]:
    """Return a micro-batch of images and their objects."""
    with scenes.loader(options.image_size, options.micro_batch) as loader:
        batch: Batch = next(iter(loader))
    return batch.images, [
        Instances(
            torch.from_numpy(placed.boxes),
            torch.from_numpy(placed.category).long() + 1,
            torch.from_numpy(placed.masks),
        )
        for placed in batch.annotated
    ]


def make_trainees(
    images: torch.Tensor, objects: list[Instances], options: argparse.Namespace, device: torch.device
) -> dict[str, Callable[[], Trainee]]:
    """Return makers of ours and the peer in training on a batch; the whole square is given as filled to both."""
    torch.manual_seed(0)
    encoder = DenseEncoder(
        options.vit,
        image_size=(options.image_size, options.image_size),
        pretraining_size=PRETRAINING_SIZE,
        window=WINDOW,
        global_blocks=evenly_placed(options.vit.depth, math.gcd(options.vit.depth, 4)),
    )
    model = MaskRcnn(encoder, classes=CLASSES, channels=options.channels)
    images, objects = images.to(device), [Instances(*(v.to(device) for v in vars(one).values())) for one in objects]
    sizes, seeds = [(options.image_size, options.image_size)] * len(images), torch.arange(len(images))

    def mine(model: nn.Module) -> torch.Tensor:
        return torch.stack(list(model.losses(images, sizes, objects, seeds).values())).sum(dim=0).mean()

    def theirs(model: nn.Module) -> torch.Tensor:
        targets = [{"boxes": one.boxes, "labels": one.labels, "masks": one.masks} for one in objects]
        return torch.stack(list(model(list(images), targets).values())).sum()

    return {
        "ours": lambda: Trainee(copy.deepcopy(model).to(device), mine, options.precision, device),
        "torchvision": lambda: Trainee(
            peer_of(model, options.channels, options.image_size).to(device), theirs, options.precision, device
        ),
    }


def measure_step(scenes: Scenes, options: argparse.Namespace, device: torch.device) -> dict:
    """Time steps of both; a dict for the table and the JSON file."""
    images, objects = batch_of(scenes, options)
    trainees = {name: make() for name, make in make_trainees(images, objects, options, device).items()}
    first_losses = {name: trainee.loss().item() for name, trainee in trainees.items()}
    laps: dict[str, list[float]] = {name: [] for name in trainees}
    for number in range(options.rounds + 1):
        for name, trainee in trainees.items():
            spent = seconds(trainee.step, options.steps, device)
            if number:  # the first allocates and chooses kernels
                laps[name].append(spent)
    result: dict = {
        "micro_batch": len(images),
        "objects": [len(one.labels) for one in objects],
        "first_loss": first_losses,
        "times_as_fast": quartiles([b / a for a, b in zip(laps["ours"], laps["torchvision"], strict=True)]),
    }
    for name, trainee in trainees.items():
        step_s = statistics.median(laps[name])
        result[name] = {"step_s": step_s, "step_s_of_rounds": laps[name], "images_per_s": len(images) / step_s}
        if device.type == "cuda":
            result[name]["peak_gib"] = trainee.peak_bytes() / 2**30
        if options.profile:
            print_profile(name, trainee.step, device)
    if device.type == "cpu":
        del trainees
        for name in laps:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # memory that was freed stays with a process
                result[name]["peak_gib"] = pool.submit(peak_gib, name, images, objects, options).result()
    return result


def peak_gib(name: str, images: torch.Tensor, objects: list[Instances], options: argparse.Namespace) -> float | None:
    """Return the most that this process holds in two steps of a model, beside what it has without it; None where Linux
    does not say it."""
    torch.set_num_threads(options.threads)
    before = kib_of("VmRSS")
    trainee = make_trainees(images, objects, options, torch.device("cpu"))[name]()
    for _ in range(2):
        trainee.step()
    most = kib_of("VmHWM")
    return None if before is None or most is None else (most - before) / 2**20


def kib_of(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def measure_images(scenes: Scenes, options: argparse.Namespace, gpu: bool) -> dict[str, dict[str, float]]:
    """Time rounds of all ways of loading annotated images."""
    size = options.jitter_size
    ways = {"ours (DALI, cpu)": ours(scenes, size), "ours, no objects (cpu)": ours(scenes, size, annotated=False)}
    if gpu:
        ways["ours (DALI, mixed)"] = ours(scenes, size, "gpu")
    ways["torchvision, Pillow"] = torchvisions(scenes, size, CocoDetection)
    ways["torchvision.io, tensors"] = torchvisions(scenes, size, TensorImages)
    return measure(ways, options.rounds)


def print_step(found: dict, options: argparse.Namespace) -> None:
    vit, fast = options.vit, found["times_as_fast"]
    rows = [
        [
            f"Mask R-CNN, {vit.width} x {vit.depth}, {options.image_size} px, batch {found['micro_batch']}, "
            f"{options.precision}",
            *[""] * 4,
        ]
    ]
    for name in ("ours", "torchvision"):
        own = found[name]
        ratio = f"{fast['median']:.2f}x as fast ({fast['lower_quartile']:.2f}, {fast['upper_quartile']:.2f})"
        peak = "" if own["peak_gib"] is None else f"{own['peak_gib']:.2f}"
        cells = [f"{1e3 * own['step_s']:.1f}", f"{own['images_per_s']:.3g}", peak, ratio if name == "ours" else ""]
        rows.append([f"  {name}", *cells])
    show(["", "step ms", "images/s", "peak GiB", "ours beside the peer (quartiles)"], rows)
    print("losses before the first step: " + ", ".join(f"{k} {v:.4g}" for k, v in found["first_loss"].items()))


def print_images(found: dict, options: argparse.Namespace) -> None:
    rows = [
        [name, *(f"{one[key]:.2f}" for key in ("cpu_ms", "cpu_ms_lowest", "cpu_ms_highest", "wall_ms"))]
        for name, one in found.items()
    ]
    title = f"{options.side} px, jittered to {options.jitter_size} px, {options.masks}"
    show([title, "CPU ms/image", "lowest", "highest", "wall ms/image"], rows)


def main() -> int:
    options = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(options.threads)
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "vit", "profile")}
    settings["vit"] = asdict(options.vit)
    report = {"command": shlex.join(["python", *sys.argv]), **machine(device), "settings": settings}
    report["versions"]["torchvision"] = torchvision.__version__
    with tempfile.TemporaryDirectory() as folder:
        scenes = Scenes(Path(folder) / "scenes", options.images, options.side, options.masks)
        if "step" in options.parts:
            report["step"] = measure_step(scenes, options, device)
            print_step(report["step"], options)
        if "images" in options.parts:
            torch.set_num_threads(1)
            report["images"] = measure_images(scenes, options, device.type == "cuda")
            print_images(report["images"], options)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("step", "images"), default=["step", "images"])
    parser.add_argument("--size", choices=NAMED, default="base" if gpu else "small")
    for name in ("width", "depth", "heads"):
        parser.add_argument(f"--{name}", type=int, help=f"in place of the {name} of --size")
    parser.add_argument("--channels", type=int, default=256, help="of the pyramid and the heads")
    parser.add_argument("--image-size", type=int, default=1024 if gpu else 256, help="of a step, pixels")
    parser.add_argument("--micro-batch", type=int, default=2, help="images in one step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16" if gpu else "fp32")
    parser.add_argument("--steps", type=int, default=5 if gpu else 1, help="of each in a round")
    parser.add_argument("--images", type=int, default=64, help="scenes")
    parser.add_argument("--side", type=int, default=640, help="of a scene, pixels")
    parser.add_argument("--jitter-size", type=int, default=1024, help="to which scenes are jittered, pixels")
    parser.add_argument("--masks", choices=("polygons", "runs"), default="polygons", help="how they are annotated")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a step on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--profile", action="store_true", help="print a profiler's table of one step of each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    if options.images < max(BATCH, options.micro_batch):
        parser.error(f"--images is {options.images}; expected at least a batch of {max(BATCH, options.micro_batch)}")
    given = {key: value for key in ("width", "depth", "heads") if (value := getattr(options, key)) is not None}
    options.vit = replace(NAMED[options.size], **given)
    return options


if __name__ == "__main__":
    sys.exit(main())
