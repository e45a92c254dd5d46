"""From a checkpoint of any engine and ranks to one file of weights for other programs, on one host without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from data_pipeline.errors import RunError, UsageError
from data_pipeline.files import whole_file
from data_pipeline.image_size import size_text
from mae_scale.checkpoints.shards import ShardReader, digest_of
from mae_scale.checkpoints.store import (
    MANIFEST,
    Damaged,
    frozen_weights_of,
    list_checkpoints,
    newest_whole,
    read_manifest,
    verify,
)
from mae_scale.config.load import stored_recipe
from mae_scale.config.schema import Recipe
from mae_scale.models.beit import Beit
from mae_scale.models.build import (
    build_beit,
    build_classifier_of,
    build_detector,
    build_moco_of,
    build_model,
    build_segmenter,
    patch_grid,
)
from mae_scale.models.classifier import Classifier
from mae_scale.models.dense import DenseModel
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.moco import Moco
from mae_scale.models.weights.autoencoder import to_hf, to_official, to_timm
from mae_scale.models.weights.beit import beit_to_hf, beit_to_official, beit_to_timm
from mae_scale.models.weights.classifier import classifier_to_hf, classifier_to_official, classifier_to_timm
from mae_scale.models.weights.files import GRID, grid_in_file, read_weights
from mae_scale.models.weights.moco import moco_to_official

FORMATS = ("official", "timm", "hf", "vitdet", "safetensors")
SUFFIXES = (".safetensors", ".pth")
Model = MaskedAutoencoder | Beit | Moco | Classifier | DenseModel
"""What a checkpoint holds."""


def weights_in(model: Model, layout: str) -> dict[str, torch.Tensor]:
    """Return a model's weights by the names of a layout, one of FORMATS; safetensors: our own names."""
    if layout == "safetensors":
        return dict(model.state_dict())
    if layout == "vitdet" or isinstance(model, DenseModel):
        return _dense_weights(model, layout)
    if isinstance(model, Beit):
        return {"official": beit_to_official, "timm": beit_to_timm, "hf": beit_to_hf}[layout](model)
    if isinstance(model, Classifier):
        to = {"official": classifier_to_official, "timm": classifier_to_timm, "hf": classifier_to_hf}
        return to[layout](model)
    if isinstance(model, Moco):
        encoder = {"timm": to_timm, "hf": to_hf}
        return moco_to_official(model) if layout == "official" else encoder[layout](model.encoder)
    if layout == "timm":
        return to_timm(model)
    # An encoder that takes the mask tokens itself leaves its decoder without one, which those layouts require.
    decoder = not model.encoder_mask_tokens
    return to_hf(model, decoder=decoder) if layout == "hf" else to_official(model, decoder=decoder)


def _dense_weights(model: Model, layout: str) -> dict[str, torch.Tensor]:
    """Return a detector's weights by ViTDet's names. Raises UsageError for another model or layout."""
    if not isinstance(model, DenseModel):
        raise UsageError("--format vitdet is of a detector; use official, timm, hf or safetensors")
    from mae_scale.models.detector import MaskRcnn
    from mae_scale.models.weights.vitdet import detector_to_vitdet

    if layout == "vitdet" and isinstance(model, MaskRcnn):
        return detector_to_vitdet(model)
    raise UsageError(
        f"a detector or a segmenter has no names in the layout {layout}; write it with --format safetensors"
        f"{', or vitdet' if isinstance(model, MaskRcnn) else ''}"
    )


def find_checkpoint(path: Path) -> Path:
    """Return a checkpoint's folder, or a run's newest whole one, after comparing every file to its digest.

    Raises UsageError when there is none at that place, RunError when it is damaged.
    """
    for checkpoints in (path / "checkpoints", path):
        if list_checkpoints(checkpoints):
            return newest_whole(checkpoints)[0]
    if not (path / MANIFEST).exists():
        what = "holds no checkpoint" if path.is_dir() else "is not a folder"
        raise UsageError(f"{path} {what}; expected a run's folder, or one of its checkpoints/step_...")
    try:
        verify(path)
    except Damaged as damage:
        raise RunError(f"checkpoint {path} is not whole: {damage}") from None
    return path


def checkpoint_model(checkpoint: Path) -> tuple[Model, Recipe]:
    """Return the model of a checkpoint, float32 on the host, in evaluation mode, and the recipe of its run.

    Its weights are their average where the run kept one; those that the run does not train come from its folder.
    """
    manifest = read_manifest(checkpoint)
    recipe = stored_recipe(manifest["recipe"], str(checkpoint))
    model = model_of(recipe, manifest)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = _frozen_weights(checkpoint, manifest["frozen"]) if manifest.get("frozen") else {}
    with ShardReader(checkpoint / name for name in manifest["files"]) as reader:
        for name, values in reader.model_state().items():
            key = name.removeprefix("model.")
            state[key] = values.view(shapes[key])
    model.load_state_dict(state)
    return model.eval(), recipe


def model_of(recipe: Recipe, manifest: dict[str, Any]) -> Model:
    """Return the model of a run's recipe, with fresh weights; a checkpoint's manifest tells what the data decided."""
    words = (manifest.get("tokeniser") or {}).get("words", 0)
    return fresh_model(recipe, classes=len(manifest.get("classes", ())), words=words)


def fresh_model(recipe: Recipe, *, classes: int, words: int) -> Model:
    """Return the model of a recipe, initialised from torch's generator; those numbers follow from data.

    Raises UsageError for a run that trains no encoder of images but a tokeniser.
    """
    if recipe.task == "dvae":
        raise UsageError(
            "the run is of task dvae, which trains a tokeniser, and no encoder: give its folder as tokeniser.weights, "
            "or to mae_scale.load_tokeniser; export/model.safetensors there has its weights"
        )
    if recipe.task == "mae":
        return build_model(recipe, words)
    if recipe.task == "beit":
        return build_beit(recipe, words)
    if recipe.task == "moco":
        return build_moco_of(recipe)
    build = {"detection": build_detector, "segmentation": build_segmenter}.get(recipe.task, build_classifier_of)
    return build(recipe, classes)


def _frozen_weights(checkpoint: Path, digest: str) -> dict[str, torch.Tensor]:
    """Return the weights that a checkpoint's run does not train. Raises RunError when they have another digest."""
    path = frozen_weights_of(checkpoint)
    try:
        found = digest_of(path)
    except OSError as error:
        raise RunError(f"{path}, the weights that the run does not train, cannot be read: {error.strerror}") from None
    if found != digest:
        raise RunError(
            f"{path}, the weights that the run does not train, is not the file that its checkpoints were written with "
            f"(sha256 {found[:12]}, expected {digest[:12]}); restore it"
        )
    return load_file(path)


def starting_point(path: Path) -> Path:
    """Return what --weights names: a file, a checkpoint, or the newest whole checkpoint of a run's folder.

    Raises UsageError when there is nothing usable at that place, RunError when a checkpoint is damaged.
    """
    return find_checkpoint(path) if path.is_dir() else path


def weights_of(source: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a file in any layout, or of a checkpoint.

    Raises UsageError when a file is missing, damaged, or holds anything but weights.
    """
    if not source.is_dir():
        return read_weights(source)
    return left_weights(checkpoint_model(source)[0])


@contextmanager
def naming(source: Path) -> Iterator[None]:
    """Put the path of weights before a UsageError of the block that copies them into a model."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None


def left_weights(model: Model) -> dict[str, torch.Tensor]:
    """Return a model's weights as those that start from them read them."""
    # Our own names of an autoencoder have no positions, and those of another grid are to be resampled.
    if isinstance(model, Beit):
        return beit_to_official(model)
    if isinstance(model, Classifier | DenseModel):
        return dict(model.state_dict())
    return to_official(model.encoder if isinstance(model, Moco) else model, decoder=False)


def grid_of_weights(source: Path) -> tuple[int, int] | None:
    """Return the rows and columns of patches of the images that weights are for; None where a file does not say.

    A checkpoint has them in its recipe, a file that was exported here beside its weights, unless they are a square's.
    """
    if not source.is_dir():
        return grid_in_file(source)
    return patch_grid(stored_recipe(read_manifest(source)["recipe"], str(source)).model)


def grid_note(model: Model) -> dict[str, str]:
    """Return what is written beside weights about their grid of patches: nothing of a square's."""
    if isinstance(model, DenseModel):
        return {}
    rows, columns = model.encoder.grid
    return {} if rows == columns else {GRID: size_text((rows, columns))}


def export_weights(model: Model, path: Path, layout: str) -> None:
    """Write a model's weights, float32, in one of FORMATS: as safetensors, or with .pth like the authors' files.

    The file appears under its name only when it is whole. Raises UsageError when it cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: expected a name that ends in .safetensors or .pth")
    state = {name: tensor.detach().float().contiguous() for name, tensor in weights_in(model, layout).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            if path.suffix == ".pth":
                torch.save({"state_dict" if isinstance(model, Moco) else "model": state, **grid_note(model)}, file)
            else:
                file.write(save(state, metadata={"format": "pt", "layout": layout, **grid_note(model)}))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
