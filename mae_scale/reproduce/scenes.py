"""`mae-scale demo --dense`: detection and segmentation in small, from a pre-trained encoder and from random weights."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline.errors import RunError
from data_pipeline.scenes import write_scenes
from mae_scale.distributed.stop_requests import passing_on
from mae_scale.reproduce.digits import mlflow_page
from mae_scale.reproduce.runs import Run, do
from mae_scale.tracking.metrics_log import read_metrics

SEEDS = (0, 1, 2)
TRAIN, VAL, SIDE = 4000, 200, 48
"""Scenes, and their side in pixels."""
MEASURES = {
    "detection": {"box_ap": "box AP", "mask_ap": "mask AP"},
    "segmentation": {"mean_iou": "mean IoU"},
}
STARTS = {"pretrained": "pre-trained", "random": "random weights"}


def run_dense(
    out: Path, *, seeds: tuple[int, ...] = SEEDS, overrides: tuple[str, ...] = ()
) -> dict[str, dict[str, Any]]:
    """Pre-train on scenes, then detect and segment from that and from random weights for each seed, below `out`.

    {measure: {start: {"mean", "std", "seeds"}}} in percent on the validation scenes; std is the sample's. A second call
    goes on where the first stopped. `overrides` go to every command.
    """
    began, console = time.monotonic(), Console(highlight=False, soft_wrap=True)
    scenes = write_scenes(out / "scenes", train=TRAIN, val=VAL, side=SIDE)
    console.print(
        f"{scenes}: {TRAIN:,} scenes to train on and {VAL} to measure, {SIDE} px. Pre-training sees all, without "
        f"annotations; detection and segmentation learn from a tenth of them, annotated, under {len(seeds)} seeds"
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several run side by side
    jobs = min(2, os.cpu_count() or 1)

    def told(run: Run) -> None:
        measured = "".join(f"  {title} {value:.1f}" for title, value in _measured(run).items())
        console.print(f"{run.name:34}{measured}  ({time.monotonic() - began:.0f} s)")

    with passing_on("what runs is ended with a checkpoint, and the same command goes on"):
        do([_pretraining(out, scenes, jobs, overrides)], 1, told)
        do([_transfer(out, scenes, *job, overrides) for job in _jobs(seeds)], jobs, told)
    found = {
        measure: {start: _summary([_value(out, task, start, seed, measure) for seed in seeds]) for start in STARTS}
        for task, measures in MEASURES.items()
        for measure in measures
    }
    _show(console, found)
    for task in MEASURES:
        console.print(f"{task}: {_folder(out, task, 'pretrained', seeds[0])}/figures/predictions.png")
    console.print(f"all runs in MLflow: {mlflow_page(out)}\n({time.monotonic() - began:.0f} s in all)")
    return found


def _jobs(seeds: tuple[int, ...]) -> list[tuple[str, str, int]]:
    """Return (task, start, seed) of each transfer, the longest first."""
    return [(task, start, seed) for task in MEASURES for seed in seeds for start in STARTS]


def _folder(out: Path, task: str, start: str, seed: int) -> Path:
    """Return the folder of a transfer; all runs lie side by side, and so share one MLflow database."""
    return out / f"{task}-{start}-seed{seed}"


def _pretraining(out: Path, scenes: Path, ranks: int, overrides: tuple[str, ...]) -> Run:
    folder = out / "pretrained"
    data = (f"data.root={scenes}/train/images", f"data.val_root={scenes}/val/images")
    words = ("pretrain", "pretrain/scenes_demo", "--out", str(folder), *data, *overrides)
    return Run("pre-training", folder, words, (), ranks)


def _transfer(out: Path, scenes: Path, task: str, start: str, seed: int, overrides: tuple[str, ...]) -> Run:
    folder = _folder(out, task, start, seed)
    annotated = {
        "detection": {"annotations": "train/instances.json", "val_annotations": "val/instances.json"},
        "segmentation": {"labels": "train/labels", "val_labels": "val/labels", "class_names": "classes.txt"},
    }
    words = [
        f"data.root={scenes}/train/images",
        f"data.val_root={scenes}/val/images",
        *(f"{task}.{key}={scenes}/{place}" for key, place in annotated[task].items()),
        f"{task}.weights={out / 'pretrained'}" if start == "pretrained" else f"{task}.from_scratch=true",
        f"seed={seed}",
    ]
    name = f"{task}, {STARTS[start]}, seed {seed}"
    return Run(name, folder, ("finetune", f"{task}/demo", "--out", str(folder), *words, *overrides), ())


def _measured(run: Run) -> dict[str, float]:
    """Return what a run has measured last, by its title; nothing of the pre-training."""
    titles = {f"val/{measure}": title for measures in MEASURES.values() for measure, title in measures.items()}
    rows = [row for row in read_metrics(run.folder / "metrics.jsonl") if titles.keys() & row.keys()]
    return {title: rows[-1][name] for name, title in titles.items() if rows and name in rows[-1]}


def _value(out: Path, task: str, start: str, seed: int, measure: str) -> float:
    folder, name = _folder(out, task, start, seed), f"val/{measure}"
    found = [row[name] for row in read_metrics(folder / "metrics.jsonl") if name in row]
    if not found:
        raise RunError(f"{folder} has no {name}; remove it, and the same command does it again")
    return float(found[-1])


def _summary(values: list[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "std": std, "seeds": values}


def _show(console: Console, found: dict[str, dict[str, Any]]) -> None:
    table = Table(title="on the validation scenes, %: mean (std) over the seeds", title_justify="left")
    table.add_column("")
    for title in STARTS.values():
        table.add_column(title, justify="right")
    for measures in MEASURES.values():
        for measure, title in measures.items():
            cells = [found[measure][start] for start in STARTS]
            table.add_row(title, *(f"{one['mean']:.1f} ({one['std']:.1f})" for one in cells))
    console.print(table)
