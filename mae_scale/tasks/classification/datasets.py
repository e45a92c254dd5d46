"""Evaluation sets in the layouts they are published in, and which of the model's classes their folders mean.

folder           <class>/*.jpg, or tar shards: ImageNet's validation set, iNaturalist, Places and one's own
imagenet-a, -r   <wnid>/*.jpg for 200 of ImageNet-1K's classes
imagenet-sketch  <wnid>/*.JPEG for all 1,000
imagenet-c       <corruption>/<severity>/<wnid>/*.JPEG, also below the folders of the published tars (noise, blur, ...)

A wnid is a WordNet number such as n01440764; ImageNet-1K's classes are its 1,000 wnids, sorted.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UsageError
from data_pipeline.index import Index
from data_pipeline.index_build import open_index

KINDS = ("folder", "imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-c")
# Images in each published set (in each severity of each corruption for ImageNet-C).
PUBLISHED_IMAGES = {"imagenet-a": 7_500, "imagenet-r": 30_000, "imagenet-sketch": 50_889, "imagenet-c": 50_000}
# AlexNet's top-1 error, the mean of the five severities: the divisors of mCE (Hendrycks and Dietterich,
# arXiv 1903.12261, and the code published with it).
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # published too, no part of mCE
CORRUPTION_GROUPS = ("noise", "blur", "weather", "digital", "extra")
SEVERITIES = (1, 2, 3, 4, 5)
NAMES_SHOWN = 5

log = logging.getLogger("mae_scale")


@dataclass(frozen=True)
class EvaluationSet:
    """Images with labels, and what the labels mean to the model.

    `name` is "" or, for ImageNet-C, such as "gaussian_noise/3"; `class_of` int64 [len(index.classes)] is the
    model's class of each of the index's labels (-1 for a folder without images); `candidates` int64 [K] are the
    classes that compete, None for all; `augmentation` is the name of the preparation: "evaluation", or
    "evaluation_whole" for ImageNet-C, whose images are 224-pixel crops already.
    """

    name: str
    index: Index
    class_of: np.ndarray
    candidates: np.ndarray | None
    augmentation: str


def open_sets(kind: str, root: Path, *, num_classes: int, class_names: list[str] | None) -> list[EvaluationSet]:
    """Return the sets of that kind in `root`: one, or for imagenet-c one a corruption and severity.

    `num_classes` is the model's, `class_names` the names of its classes as the training folder had them, None when
    they are not known. A plain folder's classes are matched by these names and may be fewer; without names by
    ImageNet-1K's wnids where all are such, else by order. Shards hold class numbers, which are taken as they are.
    Indices are kept beside the images. Raises UsageError when `root` is not laid out like that kind or does not
    fit the model. Warns when it holds another number of images than were published.
    """
    root = Path(root)
    if kind not in KINDS:
        raise UsageError(f"unknown evaluation set '{kind}'; expected one of {', '.join(KINDS)}")
    if kind == "folder":
        return [folder_set(open_index(root, progress=False), num_classes=num_classes, class_names=class_names)]
    _check_model(kind, num_classes, class_names)
    if kind == "imagenet-c":
        sets = [_open_corruption(name, folder) for name, folder in _corruptions(root).items()]
    else:
        sets = [_open_imagenet(kind, root)]
    _compare_with_published(kind, root, sets)
    return sets


def folder_set(index: Index, *, num_classes: int, class_names: list[str] | None) -> EvaluationSet:
    """Return the set of a plain folder's index; see `open_sets`."""
    refuse_unlabelled(index)
    return EvaluationSet("", index, _folder_classes(index, num_classes, class_names), None, "evaluation")


def corruption_summary(errors: dict[str, float]) -> dict[str, Any]:
    """Return ImageNet-C's summary, from top-1 errors in percent by set name ("gaussian_noise/3").

    {"mCE": percent, "corruptions": {"gaussian_noise": {"error": percent, "CE": percent}, ...}}. `error` is the mean
    of the five severities, CE that of the model divided by that of AlexNet, mCE the mean CE of the 15 corruptions
    (arXiv 1903.12261, section 4.3). The extra corruptions, where given, have no CE. Raises KeyError when one of the
    15 x 5 errors is missing.
    """
    extra = [corruption for corruption in EXTRA_CORRUPTIONS if f"{corruption}/1" in errors]
    corruptions: dict[str, dict[str, float]] = {}
    for corruption in (*ALEXNET_ERROR, *extra):
        mean = sum(errors[f"{corruption}/{severity}"] for severity in SEVERITIES) / len(SEVERITIES)
        corruptions[corruption] = {"error": mean}
        if corruption in ALEXNET_ERROR:
            corruptions[corruption]["CE"] = mean / ALEXNET_ERROR[corruption]
    mean_ce = sum(corruptions[corruption]["CE"] for corruption in ALEXNET_ERROR) / len(ALEXNET_ERROR)
    return {"mCE": mean_ce, "corruptions": corruptions}


@functools.cache
def imagenet_wnids(name: str = "imagenet") -> list[str]:
    """Return the sorted wnids of "imagenet" (ImageNet-1K), "imagenet_a" or "imagenet_r", from timm's lists."""
    return (resources.files("timm") / "data" / "_info" / f"{name}_synsets.txt").read_text().split()


def _open_labelled(root: Path) -> Index:
    index = open_index(root, progress=False)
    refuse_unlabelled(index)
    return index


def refuse_unlabelled(index: Index) -> None:
    """Raise UsageError when an image has no label."""
    unlabelled = np.flatnonzero(index.label < 0)
    if len(unlabelled):
        found = f"{len(unlabelled):,} of the {len(index):,} images in {index.root}, such as {index.name(unlabelled[0])}"
        if index.kind == "shards":
            raise UsageError(f"{found}, have no label; expected a .cls member beside each image, add it to the shards")
        raise UsageError(f"{found}, lie in no class folder; expected a folder per class, move them into such folders")


def _folder_classes(index: Index, num_classes: int, class_names: list[str] | None) -> np.ndarray:
    names, labels = index.classes, np.unique(index.label)
    if index.kind == "shards":
        if len(names) > num_classes:
            raise UsageError(
                f"{index.root} has labels up to {len(names) - 1}, but the model has {num_classes} classes (0 to "
                f"{num_classes - 1}); give the shards of the data it was trained on"
            )
        return np.arange(len(names))
    held = [names[label] for label in labels]
    if class_names and set(held).isdisjoint(class_names) and class_names == _numbers(len(class_names)):
        class_names = None  # the model was trained on shards, which have no names
    if class_names is None and num_classes == len(imagenet_wnids()) and set(held) <= set(imagenet_wnids()):
        class_names = imagenet_wnids()
    if class_names is None:
        if len(names) != num_classes:
            raise UsageError(
                f"{index.root} holds {len(names)} class folders, but the model has {num_classes} classes and no names "
                "of them to match; give a folder with one folder for each class"
            )
        return np.arange(num_classes)
    class_of = {name: number for number, name in enumerate(class_names)}
    strange = [name for name in held if name not in class_of]
    if strange:
        raise UsageError(
            f"{index.root} holds class folders that the training data did not have ({len(strange)}): {_some(strange)}; "
            f"expected names such as {_some(class_names)}; remove or rename them, or give the right folder"
        )
    return np.array([class_of.get(name, -1) for name in names], np.int64)


def _check_model(kind: str, num_classes: int, class_names: list[str] | None) -> None:
    """Raise UsageError when the model's classes are not ImageNet-1K's."""
    wnids = imagenet_wnids()
    if num_classes != len(wnids):
        raise UsageError(f"{kind} needs a model of ImageNet-1K's {len(wnids)} classes; this one has {num_classes}")
    if class_names is not None and class_names not in (wnids, _numbers(len(class_names))):
        strange = sorted(set(class_names) - set(wnids)) or class_names
        raise UsageError(
            f"{kind} needs a model of ImageNet-1K's classes, in the order of their wnids; this one was trained on "
            f"{len(class_names)} other ones, such as {_some(strange)}"
        )


def _open_imagenet(kind: str, root: Path) -> EvaluationSet:
    """Open ImageNet-A, -R or -Sketch: all of its class folders, and no other."""
    expected = imagenet_wnids("imagenet" if kind == "imagenet-sketch" else kind.replace("-", "_"))
    found = _folders(root)
    missing, strange = sorted(set(expected) - found), sorted(found - set(expected))
    if missing or strange:
        parts = [f"lacks {len(missing)} of the {len(expected)} class folders ({_some(missing)})"] if missing else []
        parts += [f"holds {len(strange)} that do not belong to it ({_some(strange)})"] if strange else []
        raise UsageError(
            f"{root} is not {kind} as published: it {' and '.join(parts)}; expected {len(expected)} folders named by "
            f"wnid, such as {expected[0]}; extract the set again and give the folder that holds them"
        )
    candidates = _wnid_classes(expected) if len(expected) < len(imagenet_wnids()) else None
    index = _open_labelled(root)
    return EvaluationSet("", index, _wnid_classes(index.classes), candidates, "evaluation")


def _corruptions(root: Path) -> dict[str, Path]:
    """Return ImageNet-C's folders by set name. Raises UsageError that names all missing ones."""
    places = [root, *(root / group for group in CORRUPTION_GROUPS if group in _folders(root))]
    at = {corruption: place / corruption for place in reversed(places) for corruption in _folders(place)}
    folders: dict[str, Path] = {}
    missing: list[str] = []
    for corruption in (*ALEXNET_ERROR, *(corruption for corruption in EXTRA_CORRUPTIONS if corruption in at)):
        found = _folders(at[corruption]) if corruption in at else set()
        lacking = [str(severity) for severity in SEVERITIES if str(severity) not in found]
        if lacking:
            missing.append(f"{corruption}/{'1-5' if len(lacking) == len(SEVERITIES) else ','.join(lacking)}")
        else:
            folders |= {f"{corruption}/{severity}": at[corruption] / str(severity) for severity in SEVERITIES}
    if missing:
        raise UsageError(
            f"{root} is not the whole of ImageNet-C, it lacks {' '.join(missing)}; expected the folders "
            "<corruption>/<severity>/<wnid> of 15 corruptions and severities 1 to 5, directly in it or below "
            f"{', '.join(CORRUPTION_GROUPS[:-1])}; extract all of the published tars there"
        )
    return folders


def _open_corruption(name: str, folder: Path) -> EvaluationSet:
    strange = sorted(_folders(folder) - set(imagenet_wnids()))
    if strange:
        raise UsageError(
            f"{folder} holds folders that are no classes of ImageNet-1K ({len(strange)}): {_some(strange)}; expected "
            f"folders named by wnid, such as {imagenet_wnids()[0]}; remove them"
        )
    index = _open_labelled(folder)
    return EvaluationSet(name, index, _wnid_classes(index.classes), None, "evaluation_whole")


def _compare_with_published(kind: str, root: Path, sets: list[EvaluationSet]) -> None:
    """Warn of an incomplete extraction, whose numbers would look like results."""
    published = PUBLISHED_IMAGES[kind]
    others = [one for one in sets if len(one.index) != published]
    if others:
        log.warning(
            "%s: %d of %d sets hold another number of images than the %s published; %s has %s, of %d classes; "
            "do not compare the results with published ones",
            *(root, len(others), len(sets), f"{published:,}", others[0].name or kind),
            *(f"{len(others[0].index):,}", len(np.unique(others[0].index.label))),
        )


def _wnid_classes(wnids: list[str]) -> np.ndarray:
    """Return int64 [n], the ImageNet-1K class of each wnid."""
    return np.searchsorted(imagenet_wnids(), wnids).astype(np.int64)


def _folders(path: Path) -> set[str]:
    """Return the names of the folders in `path`, without hidden ones."""
    try:
        with os.scandir(path) as entries:
            return {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}
    except OSError as error:
        raise UsageError(f"cannot list {path}: {error.strerror}; give the folder of the evaluation set") from None


def _numbers(count: int) -> list[str]:
    """Return the classes of shards by name."""
    return [str(number) for number in range(count)]


def _some(names: list[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
