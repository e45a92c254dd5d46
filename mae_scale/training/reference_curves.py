"""Curves by epoch: of a run, and of the packaged recipes that were run, to tell whether a loss is as usual.

Beside a recipe NAME.yaml, NAME.curve.json holds what `curve` made of such a run, and what it was run on.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError
from mae_scale.config.load import find_recipe, load_recipe, packaged_recipes
from mae_scale.config.schema import Recipe, differing_keys
from mae_scale.tracking.metrics_log import read_metrics

MEANS = ("train/loss", "train/grad_norm")
LAST = ("val/loss", "val/top1", "val/knn_top1", "val/box_ap", "val/mask_ap", "val/mean_iou")
MOST_DIFFERENCES = 5
"""A recipe that differs from a run in more keys is no reference for it."""

Curve = dict[str, list[float | None]]
"""By metric: a value for each epoch, from the first one; None where there is none."""


@dataclass(frozen=True)
class Reference:
    """A packaged recipe that was run."""

    name: str
    ran_on: str
    """The machine and the images."""
    curve: Curve
    differs: list[str]
    """Keys of the run it is held against that have other values, as "section.key: reference -> run"."""


@dataclass(frozen=True)
class ComparedRun:
    """A run's curve, and the packaged recipe that it is held against; None where there is none like it."""

    name: str
    curve: Curve
    epochs: int
    """Length of the schedule."""
    reference: Reference | None


def curve(rows: Iterable[Mapping[str, Any]]) -> Curve:
    """Return a run's logged rows by epoch: the mean of training loss and gradient norm, the last of the others."""
    by_epoch: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        by_epoch[math.ceil(row["epoch"])].append(row)
    found: Curve = {}
    for metric in (*MEANS, *LAST):
        values = []
        for epoch in range(1, max(by_epoch, default=0) + 1):
            finite = [row[metric] for row in by_epoch[epoch] if math.isfinite(row.get(metric, math.nan))]
            values.append((statistics.fmean(finite) if metric in MEANS else finite[-1]) if finite else None)
        if any(value is not None for value in values):
            found[metric] = values
    return found


def compared_run(out: Path) -> ComparedRun:
    """Return the curve of a run's folder and its reference. Raises UsageError for a folder without a logged step."""
    if not (out / "recipe.yaml").is_file():
        raise UsageError(f"{out} has no recipe.yaml; expected the folder of a run, such as runs/vit_large")
    recipe, rows = load_recipe(str(out / "recipe.yaml")), read_metrics(out / "metrics.jsonl")
    if not rows:
        raise UsageError(f"{out} has no logged step yet; compare it once metrics.jsonl has a line")
    return ComparedRun(out.name, curve(rows), recipe.schedule.epochs, reference_of(recipe))


def reference_of(recipe: Recipe) -> Reference | None:
    """Return the packaged recipe with a curve that differs from a run's recipe in the fewest keys, but for the seed."""
    nearest: Reference | None = None
    for name in packaged_recipes():
        path = curve_file(name)
        if not path.exists():
            continue
        packaged = load_recipe(name)
        differs = differing_keys(packaged.model_copy(update={"seed": recipe.seed}), recipe)
        if packaged.task == recipe.task and len(differs) <= min(MOST_DIFFERENCES, _count(nearest)):
            content = json.loads(path.read_text(encoding="utf-8"))
            nearest = Reference(name, content["ran_on"], content["curve"], differs)
    return nearest


def curve_file(name: str) -> Path:
    """Return the place of a packaged recipe's curve, whether it was run or not."""
    return find_recipe(name).with_suffix(".curve.json")


def _count(nearest: Reference | None) -> int:
    return MOST_DIFFERENCES if nearest is None else len(nearest.differs) - 1
