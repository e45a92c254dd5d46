"""A classifier's starting weights, and the file in the run's folder that keeps its frozen weights."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from data_pipeline.errors import RunError, UsageError
from data_pipeline.files import write_atomically
from mae_scale.checkpoints.export import grid_of_weights, naming, starting_point, weights_of
from mae_scale.checkpoints.shards import digest_of
from mae_scale.checkpoints.store import FROZEN
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import first_then_others
from mae_scale.models.beit import BeitEncoder
from mae_scale.models.classifier import Classifier
from mae_scale.models.weights.checked_copy import LoadReport
from mae_scale.models.weights.classifier import load_classifier
from mae_scale.tasks.starting_weights import loaded_notes
from mae_scale.training.inputs import has_checkpoint, started_from
from mae_scale.training.task import Origin


def initialise(model: Classifier, recipe: Recipe, out: Path, *, classes: list[str]) -> Origin:
    """Load the weights that the run in `out` starts from, unless it has a checkpoint. All ranks call it.

    Frozen weights are written into `out` once; every rank and every start reads them there.
    Raises UsageError when weights are lost or do not fit, RunError when the frozen part is damaged.
    """
    weights = recipe.classification.weights
    notes: list[str] = []
    source: Path | None = None  # what this start has read its weights from
    begun, is_frozen = has_checkpoint(out), recipe.classification.trained_blocks is not None
    if weights is not None and not begun:
        source, notes = first_then_others(lambda: _load(model, weights))
    if is_frozen:
        read = first_then_others(lambda: _keep_frozen(model, recipe, out, begun))
        if read is not None:
            source, notes = read
        _load_frozen(model, out / FROZEN)
    # Only what rank 0 says about the weights is written down, and to read them all takes long.
    is_first = torch.distributed.get_rank() == 0
    facts = {
        "classes": classes,
        "frozen": digest_of(out / FROZEN) if (out / FROZEN).exists() else None,
        "started_from": started_from(out, source) if is_first else None,
    }
    return Origin(notes, facts)


def load_weights(model: Classifier, source: Path) -> LoadReport:
    """Load the weights of a file or a checkpoint. Raises UsageError when they do not fit."""
    state, grid = weights_of(source), grid_of_weights(source)
    with naming(source):
        loaded = load_classifier(model, state, grid)
    if "pos_embed" in loaded.not_set:
        raise UsageError(
            f"{source} has no positions, so the image size that it was trained at is not known; "
            "write it again with `mae-scale export --format official`"
        )
    return loaded


def _load(model: Classifier, path: Path) -> tuple[Path, list[str]]:
    """Load the weights that a path names; return what was read, and lines about what of it was used."""
    source = starting_point(path)
    loaded = load_weights(model, source)
    return source, loaded_notes(loaded, path, source, takes_beit=isinstance(model.encoder, BeitEncoder))


def _keep_frozen(model: Classifier, recipe: Recipe, out: Path, begun: bool) -> tuple[Path, list[str]] | None:
    """Write the frozen weights into the run's folder, where they are missing; return the source that was read."""
    file, read = out / FROZEN, None
    # Without a checkpoint nothing has counted on the file: it may be of an older state of --weights.
    if file.exists() and (begun or torch.distributed.get_rank() > 0):
        return None
    if begun:  # lost: what is read anew must have the digest that the checkpoints know
        weights = recipe.classification.weights
        if weights is None or not weights.exists():
            raise UsageError(
                f"{file}, the weights that the run does not train, is lost; restore it, or add --weights PATH with "
                "the weights that the run was begun with: it is written again from them"
            )
        read = _load(model, weights)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    write_atomically(file, save({name: t for name, t in model.state_dict().items() if name in frozen}))
    return read


def _load_frozen(model: Classifier, file: Path) -> None:
    try:
        model.load_state_dict(load_file(file), strict=False)
    except SafetensorError as error:
        raise RunError(
            f"{file}, the weights that the run does not train, is damaged ({error}); remove it, "
            "it is written again from --weights",
            on_all_ranks=True,
        ) from None
