"""From a checkpoint to one file of weights that others read: on one host, without a GPU, whoever wrote it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from data_pipeline.errors import RunError, UsageError
from data_pipeline.files import whole_file
from mae_scale.checkpoints.shards import EMA, ShardReader, digest_of
from mae_scale.checkpoints.store import Damaged, list_checkpoints, newest_whole, read_manifest, verify
from mae_scale.config.load import stored_recipe
from mae_scale.config.schema import Recipe
from mae_scale.models.build import build_classifier_of, build_model
from mae_scale.models.classifier import Classifier
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.weights.autoencoder import read_weights, to_hf, to_official, to_timm
from mae_scale.models.weights.classifier import classifier_to_hf, classifier_to_official, classifier_to_timm

FORMATS = ("official", "timm", "hf", "safetensors")
SUFFIXES = (".safetensors", ".pth")
FROZEN = "frozen.safetensors"  # in a run's folder: the weights that it does not train


def weights_in(model: MaskedAutoencoder | Classifier, layout: str) -> dict[str, torch.Tensor]:
    """Return a model's weights by the names of a layout, one of FORMATS; safetensors: our own names."""
    if layout == "safetensors":
        return dict(model.state_dict())
    if isinstance(model, Classifier):
        to = {"official": classifier_to_official, "timm": classifier_to_timm, "hf": classifier_to_hf}
        return to[layout](model)
    # An encoder that takes the mask tokens itself leaves its decoder without one, which those layouts require.
    decoder = not model.encoder_mask_tokens
    to = {"official": partial(to_official, decoder=decoder), "timm": to_timm, "hf": partial(to_hf, decoder=decoder)}
    return to[layout](model)


def find_checkpoint(path: Path) -> Path:
    """Return a checkpoint's folder, given it or a run's (then its newest whole one), every file compared to its digest.

    Raises UsageError when there is none at that place, RunError when it is damaged.
    """
    for checkpoints in (path / "checkpoints", path):
        if list_checkpoints(checkpoints):
            return newest_whole(checkpoints)[0]
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder; expected a run's folder, or one of its checkpoints/step_...")
    try:
        verify(path)
    except Damaged as damage:
        raise RunError(f"checkpoint {path} is not whole: {damage}") from None
    return path


def checkpoint_model(checkpoint: Path) -> tuple[MaskedAutoencoder | Classifier, Recipe]:
    """Return the model of a checkpoint, float32 on the host, in evaluation mode; and the recipe of its run.

    Weights of which an average was kept are that average; those that the run does not train lie in its folder.
    """
    manifest = read_manifest(checkpoint)
    recipe = stored_recipe(manifest["recipe"], str(checkpoint))
    if recipe.task == "mae":
        model, weights = build_model(recipe), "weight"
    else:
        model = build_classifier_of(recipe, len(manifest["classes"]))
        weights = EMA if recipe.classifier.ema is not None else "weight"
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = read_frozen(checkpoint.parent.parent / FROZEN, manifest) if manifest.get("frozen") else {}
    with ShardReader(checkpoint / name for name in manifest["files"]) as reader:
        for name in reader.names:
            part, _, key = name.partition("/")
            if part in (weights, "buffer"):
                key = key.removeprefix("model.")
                state[key] = reader.whole(name).view(shapes[key])
    model.load_state_dict(state)
    return model.eval(), recipe


def read_frozen(path: Path, manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the weights that a run does not train. Raises RunError when they are not those of its checkpoint."""
    try:
        found = digest_of(path)
    except OSError as error:
        raise RunError(f"{path}, the weights that the run does not train, cannot be read: {error.strerror}") from None
    if found != manifest["frozen"]:
        raise RunError(
            f"{path}, the weights that the run does not train, is not the file that its checkpoints were written with "
            f"(sha256 {found[:12]}, expected {manifest['frozen'][:12]}); restore it"
        )
    return load_file(path)


def starting_point(path: Path) -> Path:
    """What --weights names: a file, a checkpoint, or of a run's folder its newest whole one.

    Raises UsageError when there is nothing usable at that place, RunError when a checkpoint is damaged.
    """
    return find_checkpoint(path) if path.is_dir() else path


def starting_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights that --weights names; raises as `starting_point` and `weights_of` do."""
    return weights_of(starting_point(path))


def weights_of(source: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a file in any layout, or of a checkpoint.

    Raises UsageError when a file is missing, damaged, or holds anything but weights.
    """
    if not source.is_dir():
        return read_weights(source)
    model, _ = checkpoint_model(source)
    # Our own names of an autoencoder have no positions, and those of another grid are to be resampled.
    return dict(model.state_dict()) if isinstance(model, Classifier) else to_official(model, decoder=False)


def export_weights(model: MaskedAutoencoder | Classifier, path: Path, layout: str) -> None:
    """Write a model's weights, float32, in one of FORMATS: as safetensors, or with .pth as the authors' files are.

    The file appears under its name only when it is whole. Raises UsageError when it cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: expected a name that ends in .safetensors or .pth")
    state = {name: tensor.detach().float().contiguous() for name, tensor in weights_in(model, layout).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            if path.suffix == ".pth":
                torch.save({"model": state}, file)
            else:
                file.write(save(state, metadata={"format": "pt", "layout": layout}))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
