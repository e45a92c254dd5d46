"""From a file, a checkpoint or a run of task dvae to its tokeniser, on one host without a GPU."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save

from data_pipeline.errors import UsageError
from data_pipeline.files import whole_file
from mae_scale.checkpoints.export import find_checkpoint
from mae_scale.checkpoints.shards import ShardReader
from mae_scale.checkpoints.store import read_manifest
from mae_scale.config.load import stored_recipe
from mae_scale.models.tokeniser import Tokeniser, TokeniserSize
from mae_scale.models.weights.tokeniser import read_tokeniser

_ENCODER = "model.encoder."


def open_tokeniser(path: Path) -> Tokeniser:
    """Return the tokeniser of a file (read_tokeniser), or of a run of task dvae or one of its checkpoints.

    Frozen, float32, on the host.

    Raises UsageError when there is none, or one with weights that are not finite: it would give words all the same.
    RunError when a checkpoint is damaged.
    """
    with torch.device("cpu"):  # a plan asks for its size where the default device is meta
        tokeniser = _of_run(path) if path.is_dir() else read_tokeniser(path)
        finite = all(weight.isfinite().all() for weight in tokeniser.parameters())
    if not finite:
        raise UsageError(f"{path} holds weights that are not finite; give a tokeniser whose training went well")
    return tokeniser


def _of_run(path: Path) -> Tokeniser:
    checkpoint = find_checkpoint(path)
    task = stored_recipe(read_manifest(checkpoint)["recipe"], str(checkpoint)).task
    if task != "dvae":
        raise UsageError(f"{path} is of a run of task {task}, which trains no tokeniser; give one of task dvae")
    return trained_tokeniser(checkpoint)


def trained_tokeniser(checkpoint: Path) -> Tokeniser:
    """Return the tokeniser of a checkpoint of task dvae, float32 on the host, frozen."""
    manifest = read_manifest(checkpoint)
    section = stored_recipe(manifest["recipe"], str(checkpoint)).tokenisation
    with torch.device("meta"):  # drawing weights here would move the generator that the model's are drawn from
        model = Tokeniser(TokeniserSize(section.width, section.words, section.blocks_per_group))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with ShardReader(checkpoint / name for name in manifest["files"]) as reader:
        trained = {
            name.removeprefix(_ENCODER): values
            for name, values in reader.model_state().items()
            if name.startswith(_ENCODER)
        }
    model.load_state_dict({name: values.view(shapes[name]) for name, values in trained.items()}, assign=True)
    return model.requires_grad_(False).eval()


def export_tokeniser(model: Tokeniser, path: Path) -> None:
    """Write a tokeniser as safetensors by the names of transformers' FlavaImageCodebook, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(save(dict(model.state_dict()), metadata={"format": "pt", "layout": "tokeniser"}))
