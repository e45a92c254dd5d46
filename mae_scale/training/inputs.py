"""The inputs of a run: images and starting weights, recognised by content, so that paths may differ between starts.

A run keeps the indexes of its first start. Until it has made a step, nothing depends on them or on its recipe, and
whatever an earlier start has left is replaced.
"""

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError
from data_pipeline.index import DamagedIndex, Index, load_index
from data_pipeline.index_build import check_data, most_are_there
from data_pipeline.index_diff import differing_images
from mae_scale.checkpoints.shards import digest_of
from mae_scale.checkpoints.store import FROZEN, Damaged, damaged_folders, list_checkpoints, read_manifest
from mae_scale.config.load import load_recipe
from mae_scale.config.schema import STARTING, Recipe, differing_keys
from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.tracking.mlflow_state import mlflow_run_of

log = logging.getLogger("mae_scale")

RECIPE, IMAGES, VALIDATION = "recipe.yaml", "index.npz", "val_index.npz"
PREPARED = "MAE_SCALE_PREPARED"
"""Variable of local ranks whose launcher has checked the inputs and prepared the output folder."""


@dataclass(frozen=True)
class RunImages:
    """The images of a run where they lie now, and whether the run's folder has their index as it is."""

    index: Index
    is_kept: bool


@dataclass(frozen=True)
class Folder:
    """A folder of images that a recipe names."""

    key: str
    """The recipe's key, for errors."""
    root: Path
    open: Callable[[], Index]
    """Indexes `root`."""


def run_images(
    kept: Path, folder: Folder, choose: Callable[[Index], Index] | None = None, *, part: bool = False
) -> RunImages:
    """Return the images of a folder: those of the index file `kept` once the run has a step, else what is found.

    `choose` selects the images of a first start; `part`: whether it may select only some of them.
    Raises UsageError when the folder is not there, or holds other images than the run has.
    """
    root = folder.root
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UsageError(f"{folder.key}={root} {what}; give the folder of the images, wherever it lies now")
    begun = has_step(kept.parent)
    known = _kept_index(kept) if begun else None
    if known is None:
        found = folder.open()
        index = choose(found) if choose else found
        if begun:
            _refuse_other_order(kept, index)
        return RunImages(_at(root, index), is_kept=False)
    index = _at(root, known)
    check_data(index)
    if index.root == known.root:
        _refuse_most_gone(folder, index, kept.parent)
        return RunImages(index, is_kept=True)
    different = differing_images(index, folder.open(), part=part)
    if different:
        raise UsageError(
            f"{folder.key}={root} holds other images than this run has: {len(different):,} differ from its "
            f"{len(index):,}, such as {different[0]}; {_which_folder(kept.parent)}"
        )
    return RunImages(index, is_kept=False)


def _refuse_most_gone(folder: Folder, index: Index, out: Path) -> None:
    """Raise UsageError when the run's own folder no longer holds its images."""
    if not most_are_there(index):
        raise UsageError(
            f"{folder.key}={folder.root} no longer holds the images of this run: of its {len(index):,}, such as "
            f"{index.name(0)}, most are gone or of another size; {_which_folder(out)}"
        )


def _which_folder(out: Path) -> str:
    return f"give the folder that the run in {out} was begun with, or a copy of it, or choose another --out"


def _kept_index(file: Path) -> Index | None:
    """Return the index in a run's folder; None when it is missing or damaged."""
    try:
        return load_index(file) if file.exists() else None
    except DamagedIndex:
        return None


def _refuse_other_order(file: Path, index: Index) -> None:
    """Warn that a run's own index is built again; raise UsageError when its checkpoints were trained on another one."""
    problem = "is damaged" if file.exists() else "is missing"
    known = recorded(file.parent, "index") if file.name == IMAGES else None
    if known not in (None, index.digest()):
        raise UsageError(
            f"{file} {problem}, and {index.root} does not give the index that the run's checkpoints were trained on; "
            "restore that file, or the data as they were, or choose another --out"
        )
    if known is not None:
        log.warning("%s %s; it is built again, and is what the checkpoints were trained on", file, problem)
    elif file.exists():
        log.warning("%s is damaged; it is built again", file)


def has_checkpoint(out: Path) -> bool:
    """Return whether the run goes on from a checkpoint, or cannot because all are damaged."""
    return bool(list_checkpoints(out / "checkpoints") or damaged_folders(out / "checkpoints"))


def has_step(out: Path) -> bool:
    """Return whether the run in a folder has made a step; if not, the folder accepts another recipe."""
    return has_checkpoint(out) or bool(read_metrics(out / "metrics.jsonl"))


def refuse_other_recipe(recipe: Recipe, out: Path) -> None:
    """Raise UsageError when a folder holds a run of another recipe that has made a step."""
    if not ((out / RECIPE).exists() and has_step(out)):
        return
    different = differing_keys(load_recipe(str(out / RECIPE)), recipe)
    if different:
        raise UsageError(
            f"--out {out} holds a run of another recipe ({'; '.join(different)}); "
            f"start it with its own recipe, or choose another --out"
        )


def started_from(out: Path, source: Path | None) -> dict[str, Any] | None:
    """Return the starting weights' place, digest and MLflow run, for a checkpoint's manifest; None when unknown.

    source: the file or checkpoint that this start has read; None where it goes on from a checkpoint of its own.
    """
    if source is None or has_checkpoint(out):
        return recorded(out, "started_from")
    if source.is_dir():
        manifest = read_manifest(source)
        known = {"manifest_sha256": manifest["manifest_sha256"], "mlflow_run_id": manifest.get("mlflow_run_id")}
    else:  # a run's export/model.safetensors lies beside its mlflow.json
        known = {"sha256": digest_of(source), "mlflow_run_id": mlflow_run_of(source.absolute().parent.parent)}
    return {"path": str(source), **known}


def refuse_other_weights(recipe: Recipe, out: Path) -> None:
    """Raise UsageError when a recipe names a file with other weights than those that the run in `out` was begun with.

    They are not needed any more, so that they may be gone; and the checkpoints of another run's folder may be newer.
    """
    path = None if recipe.start is None else recipe.start.weights
    known = (recorded(out, "started_from") or {}).get("sha256")
    if known is None or path is None or not path.is_file():
        return
    found = digest_of(path)
    if found != known:
        raise UsageError(
            f"{STARTING[recipe.task]}.weights={path} (--weights) are other weights than the run in {out} was begun "
            f"with (sha256 {found[:12]}, expected {known[:12]}); drop --weights to go on with that run, or choose "
            "another --out"
        )


def recorded(out: Path, fact: str) -> Any:
    """Return a fact of the newest readable manifest of a run; None when there is none."""
    for _, folder in reversed(list_checkpoints(out / "checkpoints")):
        with contextlib.suppress(Damaged):
            return read_manifest(folder).get(fact)
    return None


def remove_leftovers(out: Path, recipe: Recipe) -> None:
    """Remove what earlier starts of another recipe, without a step, left in a folder; so too their link to MLflow."""
    with contextlib.suppress(UsageError):  # not there, or no longer readable
        if load_recipe(str(out / RECIPE)).flat() == recipe.flat():
            return
    for name in ("mlflow.json", "engine.json", "events.jsonl", "metrics.jsonl", VALIDATION, FROZEN):
        (out / name).unlink(missing_ok=True)


def is_prepared(out: Path, recipe: Recipe) -> bool:
    """Return whether this rank's launcher has prepared the folder, and no other recipe has been written there since."""
    if PREPARED not in os.environ:
        return False
    return load_recipe(str(out / RECIPE)).flat() == recipe.flat()


def _at(root: Path, index: Index) -> Index:
    """Return an index as a run keeps it: with the place of its folder, however `root` is written."""
    return index.at(Path(os.path.realpath(root)))
