"""How fast does each method train the same ViT? Steps of MAE, BEiT, MoCo v3 and supervised training, side by side.

    python bench/methods.py                                           # ViT-B on a CPU, ViT-L on a GPU
    python bench/methods.py --size base --micro-batch 256 --json methods.json

Each method's step is that of `mae-scale pretrain` or `finetune` under ZeRO 1: its packaged recipe, the product's
engine, one batch of random images. BEiT's words come from a tokeniser of the published size with random weights, in
each step or stored. One method in memory at a time; laps go round by turns (--rounds), and ratios are taken within a
round. "published schedule" is that of its paper, in epochs of ImageNet-1K: MAE 1600, BEiT 800, MoCo v3 300,
supervised 300 (ViT-B) or 200 (ViT-L).
"""

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from report import machine, show
from timing import seconds

from data_pipeline.batches import Batch
from mae_scale.config.load import load_recipe
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import ranks_from_environment
from mae_scale.engines.base import Objective
from mae_scale.engines.policy import layout_of
from mae_scale.engines.select import scale_out
from mae_scale.models.build import build_beit, build_classifier_of, build_moco_of, build_model, size_of
from mae_scale.models.tokeniser import STRIDE, Tokeniser, TokeniserSize
from mae_scale.tasks.beit.objective import PredictRemoved
from mae_scale.tasks.classification.objective import Classify
from mae_scale.tasks.mae.objective import Reconstruct
from mae_scale.tasks.moco.objective import Contrast
from mae_scale.tasks.registry import task_of
from mae_scale.tasks.words import TokenisedWords, products_of

CLASSES = 1000
TINY = [f"model.{key}" for key in ("name=null", "image_size=32", "patch_size=8", "width=32", "depth=2", "heads=2")]
LR = 1e-4
WARM_UP_STEPS, GROUPS = {"cpu": 1, "cuda": 3}, {"cpu": 2, "cuda": 5}


class StoredWords:
    """Words that are not computed, as those that `mae-scale tokens` has written."""

    def __init__(self, words: int):
        self.words, self.digest = words, "stored"

    def of(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """Return the words int64 [B, L] of a batch's images."""
        patches = (batch.second.shape[-1] // STRIDE) ** 2
        return torch.from_numpy(batch.sample_ids[:, None] % self.words).expand(-1, patches).contiguous().to(device)


@dataclass(frozen=True)
class Method:
    """A method: its recipe, the length of its published schedule, and how its objective is made."""

    name: str
    recipe: str
    epochs: int
    objective: Callable[[Recipe], Objective]


def methods_of(size: str) -> list[Method]:
    """Return the methods for ViT-B ("base"), ViT-L ("large") or a tiny ViT, MAE first."""
    words = TokeniserSize(8, 16, 1) if size == "tiny" else TokeniserSize()
    size = "base" if size == "tiny" else size
    beit = f"pretrain/beit_vit_{size}_800ep"
    return [
        Method("MAE", f"pretrain/vit_{size}_1600ep", 1600, lambda r: Reconstruct(build_model(r), seed=0)),
        Method("BEiT, words in each step", beit, 800, lambda r: _beit(r, TokenisedWords(Tokeniser(words).eval()))),
        Method("BEiT, words stored", beit, 800, lambda r: _beit(r, StoredWords(words.words))),
        Method("MoCo v3", f"pretrain/moco_v3_vit_{size}", 300, lambda r: Contrast(build_moco_of(r), temperature=0.2)),
        Method(
            "supervised",
            f"scratch/vit_{size}",
            300 if size == "base" else 200,
            lambda r: Classify(build_classifier_of(r, CLASSES), r.classification, seed=0),
        ),
    ]


def _beit(recipe: Recipe, words: TokenisedWords | StoredWords) -> PredictRemoved:
    return PredictRemoved(build_beit(recipe, words.words), words, seed=0, global_batch=recipe.data.global_batch)


def lap(method: Method, options: argparse.Namespace, device: torch.device) -> tuple[list[float], float]:
    """Build, warm up, time and free a method; return seconds per step, and GFLOPs per image."""
    gc.collect()
    recipe = recipe_of(method, options)
    torch.manual_seed(0)
    objective = method.objective(recipe)
    batch = batch_of(recipe, objective)
    engine = scale_out(objective, recipe, layout_of(recipe, 1), device)
    decay = 0.99 if recipe.moco else None

    def step() -> torch.Tensor:
        return engine.train_step([objective.tensors(batch, device)], LR, decay).loss

    try:
        seconds(step, WARM_UP_STEPS[device.type], device)
        times = [seconds(step, 1, device) for _ in range(GROUPS[device.type])]
    finally:
        engine.close()
    flops = task_of(recipe, Path("unused")).training_flops()
    if isinstance(getattr(objective, "words", None), StoredWords):
        with torch.device("meta"):  # the size that a plan takes where there is no file
            products = products_of(Tokeniser(), batch.second.shape[-1])
        flops -= sum(2 * rows * inner * outer for rows, inner, outer in products)
    return times, flops / 1e9


def recipe_of(method: Method, options: argparse.Namespace) -> Recipe:
    """Return a method's packaged recipe for one rank and one micro-batch."""
    return load_recipe(
        method.recipe,
        [
            f"data.global_batch={options.micro_batch}",
            "engine.micro_batch=null",
            "engine.zero_stage=1",
            f"engine.precision={options.precision}",
            *(["tokeniser.weights=unused"] if "beit" in method.recipe else []),
            *(TINY if options.size == "tiny" else []),
        ],
    )


def batch_of(recipe: Recipe, objective: Objective) -> Batch:
    """Return a batch of random images, with a second view, and what the objective draws for it."""
    n, side = recipe.data.global_batch, recipe.model.image_size
    random, positions = torch.Generator().manual_seed(1), np.arange(n)
    second = side if recipe.moco else side // size_of(recipe.model).patch_size * STRIDE
    return Batch(
        torch.randn(n, 3, side, side, generator=random),
        torch.from_numpy(positions % CLASSES),
        positions,
        positions,
        np.ones(n, bool),
        number=0,
        replaced=0,
        drawn=objective.draw(0, positions),
        second=torch.rand(n, 3, second, second, generator=random),
    )


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    results: dict[str, list[list[float]]] = {}
    flops: dict[str, float] = {}
    with process_group(ranks_from_environment(), 600) as device:
        methods = methods_of(options.size)
        for number in range(options.rounds):
            for method in methods:
                times, flops[method.name] = lap(method, options, device)
                results.setdefault(method.name, []).append(times)
                print(f"round {number}: {method.name}: {statistics.median(times):.3g} s per step", flush=True)
        report(methods, results, flops, options, machine(device))


def report(methods, results, flops, options, where) -> None:
    """Print the table, and write the figures."""
    rows, kept = [], []
    first = [statistics.median(times) for times in results[methods[0].name]]
    for method in methods:
        medians = [statistics.median(times) for times in results[method.name]]
        rate = options.micro_batch / statistics.median(medians)
        slower = statistics.median(own / mae for own, mae in zip(medians, first, strict=True))
        schedule = slower * method.epochs / methods[0].epochs
        numbers = (f"{rate:.3g}", f"{slower:.2f}", f"{flops[method.name]:.1f}", str(method.epochs), f"{schedule:.2f}")
        rows.append([method.name, *numbers])
        kept.append(
            {
                "method": method.name,
                "images_per_s": rate,
                "step_over_mae": slower,
                "gflops_per_image": flops[method.name],
                "epochs": method.epochs,
                "published_schedule_over_mae": schedule,
                "step_s": results[method.name],
            }
        )
    print(f"{options.size}, {options.micro_batch} images per step, {options.precision}, on {where['device']}")
    show(["", "images/s", "step / MAE's", "GFLOPs/image", "epochs", "published schedule / MAE's"], rows)
    if options.json:
        command = " ".join(["python", *sys.argv])
        content = {"command": command, "machine": where, "size": options.size, "methods": kept}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=("tiny", "base", "large"), default="large" if gpu else "base")
    parser.add_argument("--micro-batch", type=int, default=128 if gpu else 4, help="images in one step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16" if gpu else "fp32")
    parser.add_argument("--rounds", type=int, default=3 if gpu else 2, help="laps of each method")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
