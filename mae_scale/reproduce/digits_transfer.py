"""`mae-scale demo --transfer`: the paper's comparison in small (He et al., section 4), on the digits, few labels."""

import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline.errors import EXIT_STOPPED, RunError
from data_pipeline.samples import write_digits
from mae_scale.config.load import load_recipe
from mae_scale.distributed.stop_requests import passing_on
from mae_scale.launch.local import launch_local_ranks
from mae_scale.reproduce.digits import mlflow_page
from mae_scale.tasks.classification.partial_curve import partial_curve
from mae_scale.tracking.finished_run import add_metrics

SEEDS = (0, 1, 2)
WEIGHTS, FINETUNED = "{weights}", "{finetuned}"


@dataclass(frozen=True)
class Way:
    """One way of using (or not using) the pre-trained encoder: what it is called, and its command."""

    name: str
    title: str
    command: tuple[str, ...]


WAYS = (
    Way("scratch", "supervised from scratch", ("finetune", "scratch/demo")),
    Way("linear_probe", "linear probing", ("probe", "probe/demo", "--weights", WEIGHTS)),
    Way("knn", "k-NN, nothing trained", ("knn", "probe/demo", "--weights", WEIGHTS)),
    *(
        Way(
            f"partial_{blocks}",
            f"partial fine-tuning, {'the last MLP' if blocks == '0.5' else f'{blocks} of 4 blocks'}",
            ("finetune", "partial/demo", f"classifier.trained_blocks={blocks}", "--weights", WEIGHTS),
        )
        for blocks in ("0.5", "1", "2")
    ),
    Way("finetune", "end-to-end fine-tuning", ("finetune", "finetune/demo", "--weights", WEIGHTS)),
)
DOUBLE = Way(
    "finetune_double",
    "then at 64 px, positions interpolated",
    ("finetune", "finetune/demo", "model.image_size=64", "schedule.epochs=20", "--weights", FINETUNED),
)


def run_transfer(
    out: Path, *, seeds: tuple[int, ...] = SEEDS, overrides: tuple[str, ...] = ()
) -> dict[str, dict[str, Any]]:
    """Pre-train and transfer in every way for each seed, below `out`; a second call goes on where the first stopped.

    {way: {"mean", "std", "seeds"}} of top-1 in percent on the held-out digits; std is the sample's. `overrides` go to
    every command.
    """
    began, console = time.monotonic(), Console(highlight=False, soft_wrap=True)
    digits = out / "digits"
    write_digits(digits)
    data = [f"data.root={digits}/train", f"data.val_root={digits}/val", *overrides]
    console.print(f"{len(seeds)} seeds: pre-training on all images without labels, then ten labels per class")
    found: dict[str, list[float]] = {way.name: [] for way in (*WAYS, DOUBLE)}
    workers = min(os.cpu_count() or 1, len(WAYS))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several run side by side
    for seed in seeds:
        with passing_on("what runs is ended, trainings with a checkpoint, and the same command goes on"):
            shared = [*data, f"seed={seed}"]
            run = _folder(out, "run", seed)
            _call(["pretrain", "demo", "--out", str(run), *shared], _file(out, "run", seed, "log"), min(2, workers))
            console.print(f"seed {seed}: pre-trained, {run}  ({time.monotonic() - began:.0f} s)")
            with ThreadPoolExecutor(workers) as pool:  # each is a process of one thread
                measured = pool.map(partial(_top1, out=out, seed=seed, overrides=shared), WAYS)
                for way, top1 in zip(WAYS, measured, strict=True):
                    found[way.name].append(top1)
                    console.print(f"seed {seed}: {way.title:46} {top1:6.2f} %  ({time.monotonic() - began:.0f} s)")
            found[DOUBLE.name].append(_top1(DOUBLE, out, seed, shared))
            measured_here = {f"transfer/top1_{name}": values[-1] for name, values in found.items()}
            add_metrics(run, load_recipe("demo", shared).tracking.uri, measured_here)
    results = {
        name: {
            "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "seeds": values,
        }
        for name, values in found.items()
    }
    _show(console, results)
    curve = out / "figures" / "partial_finetuning.png"
    names = ("linear_probe", "partial_0.5", "partial_1", "partial_2", "finetune")
    partial_curve([_folder(out, name, seed) for seed in seeds for name in names], curve)
    console.print(f"curve of partial fine-tuning: {curve}")
    console.print(f"what each command said and measured: {out}/transfer; their runs in MLflow: {mlflow_page(out)}")
    console.print(f"({time.monotonic() - began:.0f} s in all)")
    return results


def _top1(way: Way, out: Path, seed: int, overrides: list[str]) -> float:
    """Run one way of transfer; return its top-1 in percent, from the command's own JSON file."""
    answer = _file(out, way.name, seed, "json")
    places = {"weights": _folder(out, "run", seed), "finetuned": _folder(out, "finetune", seed)}
    words = [word.format(**places) for word in way.command]
    if way.name == "knn":
        overrides = [*overrides, "data.labels_per_class=10"]
    else:
        words += ["--out", str(_folder(out, way.name, seed))]
    _call([*words, *overrides, "--json", str(answer)], _file(out, way.name, seed, "log"))
    return json.loads(answer.read_text(encoding="utf-8"))["top1"]


def _folder(out: Path, name: str, seed: int) -> Path:
    """Return the folder of a run; all lie side by side, and so share one MLflow database."""
    return out / f"{name}-seed{seed}"


def _file(out: Path, name: str, seed: int, kind: str) -> Path:
    (out / "transfer").mkdir(exist_ok=True)
    return out / "transfer" / f"{name}-seed{seed}.{kind}"


def _call(words: list[str], log: Path, ranks: int = 1) -> None:
    """Run `mae-scale WORDS` with its output in a file. Raises RunError with its last lines when it fails."""
    code = launch_local_ranks(ranks, words, log=log)
    if code == EXIT_STOPPED:
        raise SystemExit(code)
    if code:
        last = " / ".join(log.read_text(encoding="utf-8").strip().splitlines()[-3:])
        raise RunError(f"`mae-scale {' '.join(words)}` ended with exit code {code}: {last} (all in {log})")


def _show(console: Console, results: dict[str, dict[str, Any]]) -> None:
    table = Table(title="top-1 on held-out digits, ten labels per class", title_justify="left")
    table.add_column("way")
    table.add_column("mean", justify="right")
    table.add_column("std", justify="right")
    table.add_column("seeds", justify="right")
    for way in (*WAYS, DOUBLE):
        found = results[way.name]
        seeds = "  ".join(f"{value:.2f}" for value in found["seeds"])
        table.add_row(way.title, f"{found['mean']:.2f}", f"{found['std']:.2f}", seeds)
    console.print(table)
