"""The points of a scaling curve, read from the folders of finished runs: one value at the end of each schedule."""

from __future__ import annotations

import difflib
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch

from data_pipeline.errors import UsageError
from data_pipeline.index import Index, load_index
from mae_scale.checkpoints.export import model_of
from mae_scale.config.load import load_recipe
from mae_scale.config.schema import Recipe
from mae_scale.models.build import size_of
from mae_scale.tasks.registry import task_of
from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.training.inputs import IMAGES, RECIPE, VALIDATION
from mae_scale.training.reference_curves import curve
from mae_scale.training.schedule import steps_of

THEN = "then"
"""Folder of the transfer that follows a point's pre-training, inside the point's."""
METRICS = {"val/loss": "val/loss", "train/loss": "train/loss", "top1": "val/top1", "knn_top1": "val/knn_top1"}
LOSS_KEYS = ("target", "mask_ratio", "masking", "image_size", "patch_size")
"""Keys of section model that decide what a loss of pre-training means."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, recipe, training images and number of updates."""

    folder: Path
    recipe: Recipe
    index: Index
    steps: int


@dataclass(frozen=True)
class Point:
    """Runs that differ in the seed only: y is their mean."""

    name: str
    size: str
    """The encoder's size, such as 192x6 (width x blocks)."""
    x: float
    y: float
    runs: int


def _compute(run: Run) -> float:
    images = run.steps * run.recipe.data.global_batch
    return task_of(run.recipe, run.folder).training_flops() * images / 1e15


def _parameters(run: Run) -> float:
    with torch.device("meta"):
        model = model_of(run.recipe, {"classes": [0, 1]})
    return sum(parameter.numel() for parameter in model.encoder.parameters())


AXES: dict[str, tuple[str, Callable[[Run], float]]] = {
    "compute": ("training compute (PFLOPs)", _compute),
    "epochs": ("epochs", lambda run: run.recipe.schedule.epochs),
    "images": ("training images", lambda run: len(run.index)),
    "parameters": ("parameters of the encoder", _parameters),
}


def read_points(sweep: Path, x: str, y: str) -> list[Point]:
    """Return the points of the runs in SWEEP/*, by ascending x.

    x: one of AXES. y: one of METRICS, of the run itself or of the transfer in its folder `then`; of accuracies the
    error in percent, 100 - y. Training loss is the mean over the last epoch. Raises UsageError for runs that cannot be
    compared.
    """
    _known("--x", x, list(AXES))
    _known("--y", y, list(METRICS))
    runs = [_run(path.parent) for path in sorted(sweep.glob(f"*/{RECIPE}"))]
    if not runs:
        raise UsageError(f"{sweep} has no folders of runs; expected {sweep}/*/{RECIPE}, as `mae-scale pretrain` leaves")
    values = {run.folder: _value(run, METRICS[y]) for run in runs}
    _refuse_mixed([run for run, _ in values.values()], y)
    alike: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        alike[run.recipe.model_copy(update={"seed": 0}).digest()].append(run)
    points = [
        Point(
            name=group[0].folder.name,
            size=_size(group[0].recipe),
            x=float(AXES[x][1](group[0])),
            y=statistics.fmean(values[run.folder][1] for run in group),
            runs=len(group),
        )
        for group in alike.values()
    ]
    return sorted(points, key=lambda point: (point.x, point.y))


def _known(option: str, given: str, names: list[str]) -> None:
    if given not in names:
        near = difflib.get_close_matches(given, names, 1, 0.3)
        advice = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"{option} {given} is not known; expected {', '.join(names)}{advice}")


def _run(folder: Path) -> Run:
    """Return a run. Raises UsageError unless its schedule was trained to its end."""
    recipe = load_recipe(str(folder / RECIPE))
    index = load_index(folder / IMAGES)
    total, rows = steps_of(recipe, len(index)).total, read_metrics(folder / "metrics.jsonl")
    done = rows[-1]["step"] if rows else 0
    if done < total:
        raise UsageError(
            f"{folder} has done {done:,} of {total:,} steps; a fit takes the value at the end of a schedule: let it "
            "finish, or move it away"
        )
    return Run(folder, recipe, index, total)


def _value(run: Run, metric: str) -> tuple[Run, float]:
    """Return the run that has measured a metric, itself or the transfer that follows it, and its value at the end."""
    following = run.folder / THEN
    for measured in [run, *([_run(following)] if (following / RECIPE).exists() else [])]:
        values = curve(read_metrics(measured.folder / "metrics.jsonl")).get(metric, [])
        if values and (value := values[-1]) is not None and isfinite(value):
            return measured, 100 - value if metric.endswith("top1") else value
    raise UsageError(
        f"{run.folder} has no finite {metric} at its end"
        + ("" if metric == "train/loss" else "; it is measured with data.val_root")
    )


def _refuse_mixed(runs: list[Run], y: str) -> None:
    """Raise UsageError when the values of runs are not of one kind."""
    kinds = [(run, _kind(run, y)) for run in runs]
    first, expected = kinds[0]
    for run, kind in kinds:
        for name, value in kind.items():
            if value != expected.get(name):
                raise UsageError(
                    f"{run.folder} has {name} {value}, {first.folder} has {expected.get(name)}: their {y} cannot be "
                    "compared; fit one kind at a time"
                )


def _kind(run: Run, y: str) -> dict[str, object]:
    """Return what must be the same for the values of y to be comparable."""
    kind: dict[str, object] = {"task": run.recipe.task}
    if y.endswith("loss") and run.recipe.task in ("mae", "beit"):
        kind |= {f"model.{key}": getattr(run.recipe.model, key) for key in LOSS_KEYS}
    if y.endswith("loss") and run.recipe.moco is not None:  # it grows with the number of images to tell apart
        kind |= {"moco": run.recipe.moco, "data.global_batch": run.recipe.data.global_batch}
    if y != "train/loss":
        kind["validation images"] = load_index(run.folder / VALIDATION).digest()[:12]
    return kind


def _size(recipe: Recipe) -> str:
    size = size_of(recipe.model)
    return f"{size.width}x{size.depth}"
