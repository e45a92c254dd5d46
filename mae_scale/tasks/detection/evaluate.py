"""`mae-scale evaluate` of a detector: COCO's average precision on data.val_root, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.files import write_json
from data_pipeline.index_build import open_index
from mae_scale.checkpoints.export import naming, starting_point, weights_of
from mae_scale.checkpoints.store import read_manifest
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import first_then_others, from_first
from mae_scale.models.build import build_detector
from mae_scale.models.weights.dense import load_dense, refuse_others
from mae_scale.tasks.dense_transfer import annotations_path
from mae_scale.tasks.detection.annotations import NEEDED
from mae_scale.tasks.detection.evaluation_set import DetectionSet, detection_set
from mae_scale.tasks.detection.figure import draw_detections
from mae_scale.tasks.detection.measure import detections, measure
from mae_scale.tasks.detection.objective import DetectObjects
from mae_scale.tasks.evaluation import Asked, all_ranks, predictor, unread, validation_root
from mae_scale.tasks.starting_weights import weights_path


def check(recipe: Recipe, asked: Asked) -> None:
    """Raise UsageError for what can be refused before a rank is started."""
    asked.check_dense(".json")
    weights_path(recipe)
    validation_root(recipe)
    annotations_path(recipe, "val_annotations", NEEDED)


def evaluate(recipe: Recipe, asked: Asked) -> dict[str, Any] | None:
    """Return what `measure` does on rank 0, else None; write what is asked for."""
    with all_ranks(recipe) as (ranks, device):
        source = from_first(lambda: starting_point(weights_path(recipe)))
        objective, one = first_then_others(lambda: _opened(recipe, source))
        seen = detections(predictor(objective, recipe, device), one, recipe, ranks=ranks, device=device)
        found = measure(seen, one)
        if not ranks.is_first:
            return None
    if asked.predictions is not None:
        write_json(asked.predictions, seen.results)
    if asked.figure is not None:
        draw_detections(one, seen.results, asked.figure)
    return found


def _opened(recipe: Recipe, source: Path) -> tuple[DetectObjects, DetectionSet]:
    """Return the detector with its weights, and the set."""
    state = weights_of(source)
    refuse_others(state, "a detector", str(source))
    # A file does not hold the names; its number of classes is compared when it is loaded.
    known = read_manifest(source)["classes"] if source.is_dir() else None
    one = detection_set(
        open_index(validation_root(recipe), progress=False),
        annotations_path(recipe, "val_annotations", NEEDED),
        categories=known,
        limit=recipe.detecting.bad_annotation_limit,
    )
    model = build_detector(recipe, len(one.category_ids))
    with naming(source):
        load_dense(model, state)
    return DetectObjects(model, seed=recipe.seed), one


def describe(recipe: Recipe, results: dict[str, Any]) -> str:
    """Return human-readable lines."""
    head = f"{recipe.data.val_root}: {summary(results)}, of {results['images']:,} images{unread(results)}"
    rows = [("", results["box"]), *((kind, map(_percent, results[kind].values())) for kind in ("box", "mask"))]
    return "\n".join([head, *(f"  {kind:6}" + "".join(f"{cell:>8}" for cell in cells) for kind, cells in rows)])


def summary(results: dict[str, Any]) -> str:
    """Return the two numbers that papers give."""
    return f"box AP {_percent(results['box']['AP'])}, mask AP {_percent(results['mask']['AP'])}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
