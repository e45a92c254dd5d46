"""Reading files of weights: safetensors, and torch's without running code that is hidden in them."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import UsageError
from mae_scale.models.weights.pickled_arrays import read_arrays

StateDict = dict[str, Tensor]
WRAPPERS = ("model", "state_dict")
GRID = "grid"
"""Beside the weights of a model for images that are not square: its rows and columns of patches, such as 4 x 8."""


def is_export(path: Path) -> bool:
    """Return whether a file was written here: its safetensors metadata name a layout."""
    if path.suffix != ".safetensors":
        return False
    with safe_open(path, "pt") as file:
        return "layout" in (file.metadata() or {})


def grid_in_file(path: Path) -> tuple[int, int] | None:
    """Return the rows and columns of patches that a file says it is for; None where it does not, as for a square."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found = (file.metadata() or {}).get(GRID)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(GRID)
        rows, columns = str(found).split(" x ")
        return int(rows), int(columns)
    except Exception:  # of files that others wrote; whether it is damaged `read_weights` says
        return None


def read_weights(path: str | Path) -> StateDict:
    """Return the tensors of a .safetensors, torch (.pth) or detectron2 (.pkl of arrays) file by name; unwraps the
    releases' {"model": ...} (MAE, detectron2) and {"state_dict": ...} (MoCo v3).

    Torch files are read with `weights_only=True`, pickles by an unpickler that takes arrays alone: code hidden in a
    file is refused, never run.
    Raises UsageError when the file is missing, damaged, refused, or holds anything but named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no weights file at {path}: expected a .safetensors, .pth or .pkl file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error
    plain = path.suffix == ".pkl" and not zipfile.is_zipfile(path)  # torch writes zip files
    content = read_arrays(path) if plain else _read_torch(path)
    if isinstance(content, dict):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()) or not content:
        found = sorted(map(str, content))[:8] if isinstance(content, dict) else type(content).__name__
        raise UsageError(f'{path} holds {found}: expected tensors by name, alone or under "model" or "state_dict"')
    return content


def _read_torch(path: Path) -> object:
    try:
        # The release keeps its arguments, a Namespace, beside "model". Warnings are on what is refused anyway.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Then comes advice to read it all the same.
        cause = re.search(r"WeightsUnpickler error:\s*(.+?)(?:\. Please |\n|$)", str(error))
        raise UsageError(
            f"{path} was refused: it is damaged, or holds more than tensors, which could run code when read"
            f"{f' ({cause[1]})' if cause else ''}. Expected weights only: fetch it again, or have its author save "
            "them as safetensors"
        ) from error
    except Exception as error:  # of a file of another kind torch takes any byte for an instruction
        raise UsageError(f"{path} is not a whole torch file ({error}): fetch it again") from error
