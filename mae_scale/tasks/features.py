"""`mae-scale features`: what a frozen encoder makes of a folder's images, written on any number of ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from data_pipeline.errors import UsageError
from data_pipeline.files import sync, temporary_beside
from data_pipeline.image_size import size_text, size_value
from data_pipeline.index import Index
from data_pipeline.index_build import open_index
from mae_scale.checkpoints.encoder import PretrainedEncoder, load_encoder
from mae_scale.config.required import required
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import first_then_others, from_first
from mae_scale.models.build import size_of
from mae_scale.tasks.evaluation import all_ranks, predictor
from mae_scale.training.evaluation_loader import evaluation_loader

Kind = Literal["cls", "mean", "patch"]
KINDS: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}


class _Tokens(torch.nn.Module):
    """An encoder's tokens of one kind."""

    def __init__(self, encoder: PretrainedEncoder, kind: Kind):
        super().__init__()
        self._encoder, self._kind = encoder, kind

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, H, W] -> [B, D], or [B, L, D] of the patches."""
        tokens = self._encoder.forward_features(images)
        if self._kind == "cls":
            return tokens[:, 0]
        return tokens[:, 1:].mean(dim=1) if self._kind == "mean" else tokens[:, 1:]


def check(recipe: Recipe, weights: Path, out: Path, kind: str) -> Kind:
    """Return the kind, checked like the rest before a rank is started. Raises UsageError."""
    required(recipe.data.root, "data.root", "add data.root=/path/to/images, a folder of images or of tar shards")
    if kind not in KINDS:
        raise UsageError(f"--kind {kind} is not known; expected cls, mean or patch")
    if not weights.exists():
        raise UsageError(f"--weights {weights} does not exist; give a folder or a file of weights")
    if out.suffix != ".safetensors":
        raise UsageError(f"--out {out}: expected a name that ends in .safetensors")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.absolute().parent}; make it, or choose another place")
    return KINDS[kind]


def write_features(recipe: Recipe, weights: Path, out: Path, kind: Kind) -> list[int] | None:
    """Write the features of data.root's images, cut as in evaluation; return their shape on rank 0, else None.

    The file has `features` float32 [N, D], with kind patch [N, L, D], in the order of the folder's index; `labels`
    int64 [N], -1 without one; `valid` bool [N], False for images that turned bad; `names` uint8, UTF-8, a line each.
    Every rank writes its own rows, so that none holds more than a batch. The file appears when it is whole.
    Raises UsageError when the weights do not fit the recipe's image size, or the file cannot be written.
    """
    with all_ranks(recipe) as (ranks, device):
        encoder, index = first_then_others(lambda: _opened(recipe, weights))
        shape = [len(index), encoder.size.width]
        if kind == "patch":
            shape.insert(1, encoder.patches)
        beside = from_first(lambda: temporary_beside(out))
        try:
            from_first(lambda: _lay_out(beside, index, shape))
            features, valid = _columns(beside, shape)
            predict = predictor(_Tokens(encoder, kind), recipe, device)
            with evaluation_loader(recipe, index, ranks) as loader:
                for batch in loader:
                    rows = batch.sample_ids[batch.valid]
                    features[rows] = predict(batch.images.to(device))[torch.from_numpy(batch.valid)].cpu().numpy()
                    valid[rows] = True
            features.flush()
            valid.flush()
            torch.distributed.barrier()
            if ranks.is_first:
                sync(beside)
                os.replace(beside, out)
        finally:
            if ranks.is_first:
                beside.unlink(missing_ok=True)
        return shape if ranks.is_first else None


def _opened(recipe: Recipe, weights: Path) -> tuple[PretrainedEncoder, Index]:
    model = recipe.model
    encoder = load_encoder(weights, heads=None if weights.is_dir() else size_of(model).heads)
    if encoder.image_size != model.image_size:
        raise UsageError(
            f"--weights {weights} are of a model for images of {size_text(encoder.image_size)} px, the recipe's "
            f"model.image_size is {size_text(model.image_size)}; add model.image_size={size_value(encoder.image_size)}"
        )
    root = required(recipe.data.root, "data.root", "add data.root=/path/to/images")
    return encoder, open_index(root, recipe.data.index)


def _lay_out(path: Path, index: Index, shape: list[int]) -> None:
    """Write the file with everything but the features, which are zero and not valid yet. Raises UsageError."""
    names = "\n".join(index.name(row) for row in range(len(index))).encode()
    labels = np.ascontiguousarray(index.label, np.int64).tobytes()
    header, ends = _header(shape, len(names))
    try:
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(header) + ends["features"])
            file.seek(0, os.SEEK_END)
            file.write(labels + bytes(len(index)) + names)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UsageError(f"--out {path.parent} cannot be written to: {error.strerror}") from None


def _header(shape: list[int], name_bytes: int) -> tuple[bytes, dict[str, int]]:
    """Return the beginning of the safetensors file, and where each tensor ends behind it."""
    count = shape[0]
    parts: tuple[tuple[str, str, list[int], int], ...] = (
        ("features", "F32", shape, 4 * int(np.prod(shape))),
        ("labels", "I64", [count], 8 * count),
        ("valid", "BOOL", [count], count),
        ("names", "U8", [name_bytes], name_bytes),
    )
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start, ends = 0, {}
    for name, dtype, size, length in parts:
        entries[name] = {"dtype": dtype, "shape": size, "data_offsets": [start, start + length]}
        start += length
        ends[name] = start
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ends


def _columns(path: Path, shape: list[int]) -> tuple[np.memmap, np.memmap]:
    """Return the file's features and valid, to be written in place."""
    with open(path, "rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(begin - 8))
    first, valid = (begin + entries[name]["data_offsets"][0] for name in ("features", "valid"))
    return (
        np.memmap(path, np.float32, "r+", first, tuple(shape)),
        np.memmap(path, np.bool_, "r+", valid, (shape[0],)),
    )
