"""The weights that a run starts from, of every task that has them: are they there, and what was read of them."""

from pathlib import Path

from data_pipeline.errors import UsageError
from mae_scale.config.required import required
from mae_scale.config.schema import STARTING, Recipe
from mae_scale.models.weights.checked_copy import LoadReport
from mae_scale.models.weights.files import is_export
from mae_scale.training.inputs import has_checkpoint, refuse_other_weights

ADVICE = "a run's folder, a checkpoint or a file of weights"


def check_start(recipe: Recipe, out: Path) -> None:
    """Raise UsageError when a run has no weights to start from, and none of its own to go on with."""
    start, section = recipe.start, STARTING[recipe.task]
    if start is None or has_checkpoint(out):  # then the weights that it started from are not needed
        return
    if start.weights is None and not start.from_scratch:
        raise UsageError(f"no weights to start from; add --weights PATH ({ADVICE}), or {section}.from_scratch=true")
    if start.weights is not None and not start.weights.exists():
        raise UsageError(
            f"{section}.weights={start.weights} (--weights) does not exist; give a folder or a file of weights"
        )


def weights_to_begin_with(recipe: Recipe, out: Path) -> Path | None:
    """Return the weights that a run begins with; None where it has none, or goes on from a checkpoint of its own.

    Raises UsageError when the recipe names others than the run in `out` was begun with.
    """
    if has_checkpoint(out):
        refuse_other_weights(recipe, out)
        return None
    return None if recipe.start is None else recipe.start.weights


def weights_path(recipe: Recipe) -> Path:
    """Return the weights to evaluate. Raises UsageError when none are named, or they do not exist."""
    start, section = recipe.start, STARTING[recipe.task]
    given = None if start is None else start.weights
    weights = required(given, f"{section}.weights", f"add --weights PATH ({ADVICE})")
    if not weights.exists():
        raise UsageError(f"{section}.weights={weights} (--weights) does not exist; give a folder or a file of weights")
    return weights


def loaded_notes(loaded: LoadReport, path: Path, source: Path, *, takes_beit: bool) -> list[str]:
    """Return the line about what was read from a path, what stays fresh, and what is not used.

    Where a BEiT was read from a file of others, `source`, a second line says what images it was trained on.
    """
    fresh = f"; fresh: {_places(loaded.not_set)}" if loaded.not_set else ""
    unused = f"; unused: {_places(loaded.unused)}" if loaded.unused else ""
    notes = [f"{len(loaded.loaded)} tensors from {path}{fresh}{unused}"]
    if takes_beit and source.is_file() and not is_export(source):
        notes.append(
            "  BEiT's published files were trained on images normalised by mean and std 0.5, and here ImageNet's are "
            "used: fine-tuning adapts to them, features of a frozen encoder are not what was published (docs/beit.md)"
        )
    return notes


def _places(names: list[str]) -> str:
    """Return names of tensors, shortened to their first parts and how many there are of each."""
    parts: dict[str, int] = {}
    for name in names:
        part = name.split(".")[0]
        parts[part] = parts.get(part, 0) + 1
    return ", ".join(f"{part} ({count})" if count > 1 else part for part, count in parts.items())
