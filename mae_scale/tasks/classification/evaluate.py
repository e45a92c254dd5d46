"""`mae-scale evaluate`: a classifier's accuracy on a validation folder or a robustness set, on any number of ranks."""

from __future__ import annotations

from typing import Any

from data_pipeline.errors import UsageError
from data_pipeline.image_size import size_value
from mae_scale.checkpoints.export import find_checkpoint, grid_of_weights, naming, starting_point, weights_of
from mae_scale.checkpoints.store import read_manifest
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import first_then_others
from mae_scale.models.build import build_classifier_of
from mae_scale.models.classifier import Classifier
from mae_scale.models.weights.classifier import classes_in, load_classifier
from mae_scale.tasks.classification.datasets import EvaluationSet, corruption_summary, open_sets
from mae_scale.tasks.classification.measure import measure, report
from mae_scale.tasks.evaluation import Asked, all_ranks, predictor, validation_root
from mae_scale.tasks.starting_weights import weights_path

FORM = " (a folder per class)"


def check(recipe: Recipe, asked: Asked) -> None:
    """Raise UsageError for what can be refused before a rank is started."""
    if asked.figure is not None or asked.predictions is not None:
        raise UsageError("--figure and --predictions are of detectors and segmenters; drop them for a classifier")
    check_inputs(recipe)


def check_inputs(recipe: Recipe) -> None:
    """Raise UsageError for a recipe of another task, and for weights or images that are not there."""
    if recipe.task != "classification":
        raise UsageError(
            f"the recipe's task is {recipe.task}, expected classification; give one of finetune/..., probe/..., "
            "or a run's recipe"
        )
    weights_path(recipe)
    validation_root(recipe, FORM)


def evaluate(recipe: Recipe, asked: Asked) -> dict[str, Any] | None:
    """Return the results of the recipe's weights on data.val_root, a set of that kind; on rank 0, else None.

    {"set": kind, "top1": percent, "top5": percent, "loss": nats, "images": n, "per_class": [...]}; imagenet-c:
    {"set": kind, "mCE": percent, "corruptions": {name: {"error", "CE"}}, "severities": {"name/severity": results}}.
    """
    kind = asked.set_kind
    with all_ranks(recipe) as (ranks, device):
        model, names, sets = first_then_others(lambda: _opened(recipe, kind))
        predict = predictor(model, recipe, device)
        found = {}
        for one in sets:
            accuracy = measure(predict, one, recipe, classes=model.classes, ranks=ranks, device=device)
            found[one.name] = report(accuracy, names or _names_of(one, model.classes), one.index)
        if not ranks.is_first:
            return None
    if kind != "imagenet-c":
        return {"set": kind, **found[""]}
    errors = {name: 100 - results["top1"] for name, results in found.items()}
    severities = {name: {key: r[key] for key in ("top1", "top5", "images", "left_out")} for name, r in found.items()}
    return {"set": kind, **corruption_summary(errors), "severities": severities}


def _opened(recipe: Recipe, kind: str) -> tuple[Classifier, list[str] | None, list[EvaluationSet]]:
    size = recipe.model.image_size
    if kind == "imagenet-c" and not isinstance(size, int):
        raise UsageError(
            f"--set imagenet-c: its images are square crops, which model.image_size={size_value(size)} would stretch; "
            "evaluate a model of square images"
        )
    model, names = trained_classifier(recipe)
    return model, names, open_sets(kind, validation_root(recipe, FORM), num_classes=model.classes, class_names=names)


def trained_classifier(recipe: Recipe) -> tuple[Classifier, list[str] | None]:
    """Return the recipe's classifier with its weights, in evaluation mode, and its class names where they are known.

    Raises UsageError when the weights have no head, or do not fit.
    """
    path = weights_path(recipe)
    source = starting_point(path)
    state = weights_of(source)
    classes = classes_in(state)
    if classes is None:
        raise UsageError(
            f"--weights {path} has no classifier's head to evaluate; fine-tune or probe it first, and give that run"
        )
    names = read_manifest(find_checkpoint(path))["classes"] if path.is_dir() else None
    model = build_classifier_of(recipe, classes)
    with naming(source):
        load_classifier(model, state, grid_of_weights(source))
    return model.eval(), names


def _names_of(one: EvaluationSet, classes: int) -> list[str]:
    """Return names of the model's classes, from the folders that hold their images."""
    names = [str(number) for number in range(classes)]
    for label, number in enumerate(one.class_of):
        if number >= 0 and label < len(one.index.classes):
            names[number] = one.index.classes[label]
    return names


def describe(recipe: Recipe, results: dict[str, Any]) -> str:
    """Return human-readable lines."""
    root = recipe.data.val_root
    if "mCE" in results:
        rows = [
            f"  {name:18} error {found['error']:6.2f} %" + (f"   CE {found['CE']:6.2f}" if "CE" in found else "")
            for name, found in results["corruptions"].items()
        ]
        return "\n".join([f"{root} (imagenet-c): mean corruption error {results['mCE']:.2f}", *rows])
    worst = sorted(results["per_class"], key=lambda found: found["top1"])[:5]
    rows = [
        f"  {found['class']:18} {found['top1']:6.2f} % of {found['images']:,}"
        + (f", taken for {', '.join(found['taken_for'])}" if found["taken_for"] else "")
        for found in worst
    ]
    left_out = f" ({results['left_out']:,} more cannot be read)" if results["left_out"] else ""
    strange = f", {results['non_finite']} without a finite answer" if results["non_finite"] else ""
    return "\n".join(
        [
            f"{root} ({results['set']}): top-1 {results['top1']:.2f} %, top-5 {results['top5']:.2f} % "
            f"of {results['images']:,} images{left_out}{strange}",
            "classes with the lowest top-1:",
            *rows,
        ]
    )
