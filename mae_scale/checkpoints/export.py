"""From a checkpoint to one file of weights that others read: on one host, without a GPU, whoever wrote it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from mae_scale.checkpoints.shards import ShardReader
from mae_scale.checkpoints.store import Damaged, list_checkpoints, newest_whole, read_manifest, verify
from mae_scale.errors import RunError, UsageError
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.weights import to_hf, to_official, to_timm
from mae_scale.recipe import Recipe
from mae_scale.training.assemble import build_model

# An encoder that takes the mask tokens itself leaves its decoder without one, which those layouts require.
FORMATS: dict[str, Callable[[MaskedAutoencoder], dict[str, torch.Tensor]]] = {
    "official": lambda model: to_official(model, decoder=not model.encoder_mask_tokens),
    "timm": to_timm,
    "hf": lambda model: to_hf(model, decoder=not model.encoder_mask_tokens),
    "safetensors": lambda model: dict(model.state_dict()),
}


def find_checkpoint(path: Path) -> Path:
    """A checkpoint's folder, given it or a run's (then its newest whole one), every file compared to its digest.

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


def checkpoint_model(checkpoint: Path) -> tuple[MaskedAutoencoder, Recipe]:
    """The model of a checkpoint, float32 on the host, in evaluation mode; and the recipe of its run."""
    manifest = read_manifest(checkpoint)
    recipe = Recipe.model_validate(manifest["recipe"])
    model = build_model(recipe)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with ShardReader(checkpoint / name for name in manifest["files"]) as reader:
        state = {}
        for name in reader.names:
            part, _, key = name.partition("/")
            if part in ("weight", "buffer"):
                key = key.removeprefix("model.")
                state[key] = reader.whole(name).view(shapes[key])
    model.load_state_dict(state)
    return model.eval(), recipe


def export_weights(model: MaskedAutoencoder, path: Path, layout: str) -> None:
    """Write a model's weights, float32, in one of FORMATS: as safetensors, or with .pth as the authors' files are.

    The file appears under its name only when it is whole. Raises UsageError when it cannot be written.
    """
    if path.suffix not in (".safetensors", ".pth"):
        raise UsageError(f"{path}: expected a name that ends in .safetensors or .pth")
    state = {name: tensor.detach().float().contiguous() for name, tensor in FORMATS[layout](model).items()}
    beside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            if path.suffix == ".pth":
                torch.save({"model": state}, file)
            else:
                file.write(save(state, metadata={"format": "pt", "layout": layout}))
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
