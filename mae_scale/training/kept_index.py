"""The index that a run keeps: which images in which order, the same as long as the run goes on."""

import logging
from collections.abc import Callable
from pathlib import Path

from data_pipeline.index import DamagedIndex, Index, load_index
from mae_scale.checkpoints.store import Damaged, list_checkpoints, read_manifest
from mae_scale.errors import UsageError

log = logging.getLogger("mae_scale.data")


def kept_index(file: Path, root: Path | None, rebuild: Callable[[], Index]) -> tuple[Index, bool]:
    """Return the index in a run's folder and True, or what `rebuild` gives and False where it is missing or damaged.

    root: where the data lie now. Raises UsageError when the run has checkpoints and `rebuild` gives other images, or in
    another order, than they were trained on.
    """
    try:
        return load_index(file, root), True
    except DamagedIndex:
        problem = "is damaged"
    except UsageError:
        if file.exists():
            raise
        problem = "is missing"
    index = rebuild()
    if list_checkpoints(file.parent / "checkpoints"):
        if index.digest() != _trained_on(file.parent):
            raise UsageError(
                f"{file} {problem}, and {index.root} does not give the index that the run's checkpoints were trained "
                "on; restore that file, or the data as they were, or choose another --out"
            )
        log.warning("%s %s; it is built again, and is what the checkpoints were trained on", file, problem)
    elif problem == "is damaged":
        log.warning("%s is damaged; it is built again, for the run has no checkpoint", file)
    return index, False


def _trained_on(out: Path) -> str | None:
    """The digest of the index in the newest manifest that can be read."""
    for _, folder in reversed(list_checkpoints(out / "checkpoints")):
        try:
            return read_manifest(folder).get("index")
        except Damaged:
            continue
    return None
