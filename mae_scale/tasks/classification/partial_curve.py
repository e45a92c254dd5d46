"""`mae-scale partial-curve`: accuracy by the number of trained blocks (He et al., figure 9), from finished runs."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe
from mae_scale.config.schema import Recipe
from mae_scale.models.build import size_of
from mae_scale.reports.partial_curve import partial_curve_figure
from mae_scale.tasks.classification.validation import EVALUATION
from mae_scale.tracking.finished_run import add_artifact
from mae_scale.tracking.mlflow_uri import tracking_uri


def partial_curve(runs: list[Path], picture: Path) -> list[dict[str, Any]]:
    """Return the curve of some runs' folders, drawn as a PNG that is also given to their MLflow runs.

    [{"trained_blocks": k, "top1": mean percent, "std": of several runs or None, "runs": n}, ...], by k.
    Raises UsageError for a folder that is no finished classifier, and for runs of encoders of different depths.
    """
    measured: dict[float, list[float]] = defaultdict(list)
    recipes = {run: _recipe(run) for run in runs}
    depths = {size_of(recipe.model).depth for recipe in recipes.values()}
    if len(depths) > 1:
        raise UsageError(
            f"the runs have encoders of {', '.join(map(str, sorted(depths)))} blocks; give runs of one model"
        )
    depth = depths.pop()
    for run, recipe in recipes.items():
        blocks = recipe.classification.trained_blocks
        top1 = json.loads((run / EVALUATION).read_text(encoding="utf-8"))["top1"]
        measured[depth if blocks is None else blocks].append(top1)
    points: list[dict[str, Any]] = [
        {
            "trained_blocks": blocks,
            "top1": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "runs": len(values),
        }
        for blocks, values in sorted(measured.items())
    ]
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        partial_curve_figure([(p["trained_blocks"], p["top1"], p["std"]) for p in points], picture, depth=depth)
    except OSError as error:
        raise UsageError(f"{picture} cannot be written: {error.strerror}") from None
    for run, recipe in recipes.items():
        uri = tracking_uri(recipe.tracking.uri, run)
        if uri is not None:
            add_artifact(run, uri, picture, "figures")
    return points


def _recipe(run: Path) -> Recipe:
    for name in ("recipe.yaml", EVALUATION):
        if not (run / name).is_file():
            raise UsageError(
                f"{run} has no {name}; "
                "expected the folder of a finished `mae-scale finetune` or `probe`, with data.val_root"
            )
    recipe = load_recipe(str(run / "recipe.yaml"))
    if recipe.task != "classification" or recipe.classification.from_scratch:
        raise UsageError(f"{run} did not start from pre-trained weights; it has no place in the curve")
    return recipe
