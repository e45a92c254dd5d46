"""`mae-scale evaluate` of a segmenter: mean intersection over union on data.val_root, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.annotations.label_maps import read_class_names
from data_pipeline.arrays import Uint8Array
from data_pipeline.errors import UsageError
from data_pipeline.index import Index
from data_pipeline.index_build import open_index
from mae_scale.checkpoints.export import naming, starting_point, weights_of
from mae_scale.checkpoints.store import read_manifest
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import first_then_others, from_all, from_first
from mae_scale.models.build import build_segmenter
from mae_scale.models.weights.dense import load_dense, refuse_others
from mae_scale.reports.dense import class_colours
from mae_scale.tasks.dense_transfer import annotations_path
from mae_scale.tasks.evaluation import Asked, all_ranks, predictor, unread, validation_root
from mae_scale.tasks.segmentation.figure import draw_classes
from mae_scale.tasks.segmentation.label_files import NEEDED, LabelFiles
from mae_scale.tasks.segmentation.measure import measure, report
from mae_scale.tasks.segmentation.objective import LabelPixels
from mae_scale.tasks.starting_weights import weights_path
from mae_scale.tasks.stored_pictures import shown_rows

WORST = 5


def check(recipe: Recipe, asked: Asked) -> None:
    """Raise UsageError for what can be refused before a rank is started."""
    asked.check_dense("")
    weights_path(recipe)
    validation_root(recipe)
    annotations_path(recipe, "val_labels", NEEDED)


def evaluate(recipe: Recipe, asked: Asked) -> dict[str, Any] | None:
    """Return mean_iou, mean_accuracy, pixel_accuracy in percent, images and per_class on rank 0, else None."""
    if asked.predictions is not None:
        asked.predictions.mkdir(parents=True, exist_ok=True)
    with all_ranks(recipe) as (ranks, device):
        source = from_first(lambda: starting_point(weights_path(recipe)))
        objective, names, index, labels = first_then_others(lambda: _opened(recipe, source))
        shown = dict.fromkeys(shown_rows(index)) if asked.figure is not None else {}
        kept: dict[int, Uint8Array] = {}

        def take(image: int, predicted: Uint8Array) -> None:
            if asked.predictions is not None:
                _write_prediction(
                    predicted, len(names), asked.predictions / Path(index.name(image)).with_suffix(".png")
                )
            if image in shown:
                kept[image] = predicted

        counts = measure(
            predictor(objective, recipe, device),
            index,
            labels,
            recipe,
            classes=len(names),
            ranks=ranks,
            device=device,
            take=take,
        )
        all_kept = {image: predicted for part in from_all(lambda: kept) for image, predicted in part.items()}
        if not ranks.is_first:
            return None
    if asked.figure is not None:
        draw_classes(index, labels, all_kept, names, asked.figure)
    return report(counts, names, index)


def _write_prediction(predicted: Uint8Array, classes: int, path: Path) -> None:
    """Write classes uint8 [H, W] as a PNG in ADE20K's values, class + 1, with a palette of colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(predicted + 1)
    picture.putpalette([0, 0, 0, *class_colours(classes).ravel().tolist()])
    picture.save(path)


def _opened(recipe: Recipe, source: Path) -> tuple[LabelPixels, list[str], Index, LabelFiles]:
    """Return the segmenter with its weights, the classes' names, the images and their label maps."""
    state = weights_of(source)
    refuse_others(state, "a segmenter", str(source))
    given = recipe.segmenting.class_names
    if source.is_dir():
        names = read_manifest(source)["classes"]
    else:
        names = read_class_names(annotations_path(recipe, "class_names", NEEDED))
    if given is not None and read_class_names(given) != names:
        raise UsageError(
            f"segmentation.class_names={given} are other classes than those that {source} was trained on; drop the key"
        )
    index = open_index(validation_root(recipe), progress=False)
    labels = LabelFiles(index, annotations_path(recipe, "val_labels", NEEDED), classes=len(names))
    model = build_segmenter(recipe, len(names))
    with naming(source):
        load_dense(model, state)
    return LabelPixels(model, seed=recipe.seed), names, index, labels


def describe(recipe: Recipe, results: dict[str, Any]) -> str:
    """Return human-readable lines."""
    known = [one for one in results["per_class"] if one["iou"] is not None]
    worst = sorted(known, key=lambda one: one["iou"])[:WORST]
    rows = [f"  {one['class']:18} {one['iou']:6.2f} %, of {one['share']:.2f} % of the pixels" for one in worst]
    return "\n".join(
        [
            f"{recipe.data.val_root} ({recipe.segmenting.evaluation}): {summary(results)}, pixel accuracy "
            f"{_percent(results['pixel_accuracy'])}, of {results['images']:,} images{unread(results)}",
            "classes with the lowest intersection over union:",
            *rows,
        ]
    )


def summary(results: dict[str, Any]) -> str:
    """Return the number that papers give."""
    return f"mean IoU {_percent(results['mean_iou'])}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"
