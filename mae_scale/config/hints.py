"""Explanations of errors in a recipe: the nearest known key, and keys that contradict each other."""

import difflib

from pydantic_core import ErrorDetails

from data_pipeline.image_size import size_value
from mae_scale.config.old_names import RENAMED
from mae_scale.config.schema import DENSE, STARTING, TASKS_WITH_SECTION, Recipe, keys_of

SCALE_JITTERS = ("large_scale_jitter", "scale_jitter")


MEASURED = {
    "classification": ("val/top1",),
    "detection": ("val/box_ap", "val/mask_ap"),
    "segmentation": ("val/mean_iou",),
}
"""What single tasks measure on data.val_root."""

RECTANGLES = ("mae", "beit", "moco", "classification")
"""Tasks whose images may have another height than width."""


def contradiction(recipe: Recipe) -> str | None:
    """Return how two keys contradict each other, where one of them would be ignored silently; else None."""
    classifier, optim = recipe.classifier, recipe.optim
    if recipe.data.cache_gib is not None and recipe.data.cache is None:
        return f"data.cache_gib={recipe.data.cache_gib:g} bounds data.cache, which is not set; add data.cache=DIR"
    if recipe.data.fraction is not None and recipe.data.labels_per_class is not None:
        return "data.fraction and data.labels_per_class each choose the training images; drop one of them"
    for task, name in STARTING.items():
        has = getattr(recipe, name) is not None
        if (recipe.task == task) != has:
            kind = "a" if has else "no"
            return (
                f"task: {recipe.task}, and {kind} section {name}; task: {task} and the section {name} belong together"
            )
    if recipe.tokeniser is not None and recipe.task not in TASKS_WITH_SECTION["tokeniser"]:
        return f"the section tokeniser gives or trains words; task: {recipe.task} does not have it"
    if recipe.tokeniser is None and recipe.task == "dvae":
        return "task: dvae trains a tokeniser, and there is no section tokeniser; add one, such as tokeniser.words=8192"
    if (recipe.task == "moco") != (recipe.moco is not None):
        return f"task: {recipe.task}, and a section moco; the section moco belongs to task: moco"
    of_parts = (_of_schedule, _of_beit, _of_words, _of_dense, _of_rectangles, _never_measured)
    if problem := next(filter(None, (part(recipe) for part in of_parts)), None):
        return problem
    start, section = recipe.start, STARTING.get(recipe.task)
    if start is None and optim.layer_decay != 1:
        return f"optim.layer_decay belongs to tasks that start from weights; task: {recipe.task} does not have it"
    if classifier is None:
        for key, found in (
            ("optim.name=lars", optim.name == "lars"),
            ("data.labels_per_class", recipe.data.labels_per_class is not None),
        ):
            if found:
                return f"{key} belongs to task: classification; task: {recipe.task} does not have it"
    if start is not None and start.from_scratch and start.weights:
        return f"{section}.from_scratch=true and {section}.weights={start.weights}; drop one of them"
    if classifier is None:
        return None
    if classifier.from_scratch and classifier.trained_blocks is not None:
        return "classifier.from_scratch=true trains everything; drop classifier.trained_blocks"
    if optim.name == "lars" and classifier.trained_blocks != 0:
        return "optim.name=lars is for linear probing (classifier.trained_blocks=0); use adamw"
    return None


def _of_schedule(recipe: Recipe) -> str | None:
    """Return which keys of the schedule contradict each other; else None."""
    shape, at = recipe.schedule.shape, recipe.schedule.step_epochs
    if (shape == "steps") != bool(at):
        return f"schedule.shape={shape}, and schedule.step_epochs={list(at)}; shape=steps and they belong together"
    last = recipe.schedule.epochs
    if list(at) != sorted(set(at)) or (at and not recipe.schedule.warmup_epochs <= at[0] <= at[-1] < last):
        return f"schedule.step_epochs={list(at)}; expected them to rise, after the warm-up and before epoch {last}"
    return None


def _of_dense(recipe: Recipe) -> str | None:
    """Return which keys of detection and segmentation the recipe has in vain; else None."""
    data, task = recipe.data, recipe.task
    if (data.augmentation in SCALE_JITTERS) != (task in DENSE):
        expected = " or ".join(SCALE_JITTERS) if task in DENSE else "another"
        return f"data.augmentation={data.augmentation}: task: {task} takes {expected}"
    if task not in DENSE:
        return None
    if data.random_erasing or data.exif_orientation:
        return f"data.random_erasing and data.exif_orientation would not move annotations; task: {task} has neither"
    return None


def _of_beit(recipe: Recipe) -> str | None:
    """Return which of BEiT's keys the recipe has in vain or lacks; else None."""
    model = recipe.model
    takes = ("beit",) if recipe.task == "beit" else ("vit", "beit") if recipe.task in STARTING else ("vit",)
    if model.encoder not in takes:
        return f"task: {recipe.task} does not train model.encoder={model.encoder}; task: beit and it belong together"
    if recipe.task == "beit" and model.target == "pca":
        return "model.target=pca belongs to task: mae; task: beit predicts tokens, normalised_pixels or pixels"
    if recipe.task != "mae" and model.encoder_mask_tokens:
        return f"model.encoder_mask_tokens belongs to task: mae; task: {recipe.task} does not have it"
    if model.encoder == "beit" and model.layer_scale is None:
        return "model.encoder=beit needs model.layer_scale, the initial scale of its branches: 0.1 for B, 1e-5 for L"
    if model.encoder != "beit" and model.layer_scale is not None:
        return f"model.layer_scale={model.layer_scale:g} belongs to model.encoder=beit"
    return None


def _of_words(recipe: Recipe) -> str | None:
    """Return whether words are predicted, or given, in vain; else None."""
    target, tasks = recipe.model.target, ("mae", "beit")
    if target == "tokens" and recipe.task not in tasks:
        return f"model.target=tokens belongs to task: mae and task: beit; task: {recipe.task} does not have it"
    if target != "tokens" and recipe.task in tasks and recipe.tokeniser is not None:
        return f"the section tokeniser gives words, and model.target={target} predicts none; drop one of them"
    return None


def _of_rectangles(recipe: Recipe) -> str | None:
    """Return what of the recipe takes square images only, where its images are not; else None."""
    model = recipe.model
    if isinstance(model.image_size, int):
        return None
    given, square = f"model.image_size={size_value(model.image_size)}", max(model.image_size)
    if recipe.task not in RECTANGLES:
        return f"{given}: task: {recipe.task} takes square images only; use one number, such as {square}"
    if model.target == "tokens":
        return (
            f"{given}: words (model.target=tokens) are found in square images only; use one number, such as {square}, "
            "or model.target=normalised_pixels"
        )
    return None


def _never_measured(recipe: Recipe) -> str | None:
    """Return which metric that the recipe asks for is never measured, and what to do; else None."""
    best, knn = recipe.checkpoint.keep_best, recipe.tracking.knn_images
    if knn is not None and recipe.task in STARTING:
        return f"tracking.knn_images belongs to pre-training; task: {recipe.task} measures its own accuracy"
    if knn is not None and recipe.data.val_root is None:
        return f"tracking.knn_images={knn} measures images of data.val_root; add data.val_root=/path/to/images"
    if best is None or not best.startswith("val/"):
        return None
    if best == "val/loss" and recipe.task in ("moco", *DENSE):
        instead = {"detection": "val/box_ap", "segmentation": "val/mean_iou"}.get(recipe.task, "val/knn_top1")
        return f"checkpoint.keep_best=val/loss is not measured by task: {recipe.task}; use {instead} or train/loss"
    if recipe.data.val_root is None:
        return f"checkpoint.keep_best={best} is measured on data.val_root; add data.val_root=/path/to/images"
    if best == "val/knn_top1" and knn is None:
        return f"checkpoint.keep_best={best} is measured with tracking.knn_images only; add tracking.knn_images=10000"
    for task, measured in MEASURED.items():
        if best in measured and recipe.task != task:
            return f"checkpoint.keep_best={best} belongs to task: {task}; use train/loss, or what this task measures"
    return None


def subject(key: str, error: ErrorDetails) -> str:
    """Return the subject of a pydantic error: the key and its value, or an unknown key and the nearest known one."""
    if error["type"] != "extra_forbidden":
        return f"{key}={error['input']!r}: "
    if key in RENAMED:
        return f"key '{key}' has a new name; write '{RENAMED[key]}'"
    section, _, last = key.rpartition(".")
    near = [f"{section}.{k}" for k in difflib.get_close_matches(last, keys_of(section), 1, 0.4)] if section else []
    known = {name: name for name in Recipe.model_fields} | {
        k: f"{s}.{k}" for s in Recipe.model_fields for k in keys_of(s)
    }
    near = near or [known[k] for k in difflib.get_close_matches(last, known, 1, 0.6)]
    return f"unknown key '{key}'" + (f"; did you mean '{near[0]}'?" if near else "")


def reason(error: ErrorDetails) -> str:
    """Return pydantic's reason for refusing a value; empty for an unknown key."""
    return "" if error["type"] == "extra_forbidden" else error["msg"][0].lower() + error["msg"][1:]
