"""Arrays that were pickled by name, as detectron2's model zoo keeps weights, without running code of the file."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import UsageError


def _encode(text: str, encoding: str) -> bytes:
    """Return bytes that protocol 2 keeps as text."""
    if encoding != "latin1":
        raise _Refused(f"it names the encoding {encoding!r}")
    return text.encode("latin1")


_RECONSTRUCT = np.zeros(0).__reduce__()[0]  # makes an empty array; its place differs between releases of NumPy
_TAKEN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("_codecs", "encode"): _encode,
}
"""What may be called: none of it runs what it is given."""


class _Refused(pickle.UnpicklingError):
    """The file names what could run code."""


class _Unpickler(pickle.Unpickler):
    """Unpickler that imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _TAKEN:
            raise _Refused(f"it names {module}.{name}")
        return _TAKEN[module, name]


def read_arrays(path: Path) -> object:
    """Return what a pickle holds, with its arrays of numbers, also those in dictionaries, as tensors on the host.

    Raises UsageError when the file is damaged, or names anything but arrays, which could run code when read.
    """
    try:
        with path.open("rb") as file:
            return _tensors(_Unpickler(file, encoding="latin1").load())
    except _Refused as error:
        raise UsageError(
            f"{path} was refused: {error}, which arrays do not need and could run code when read; fetch it again, or "
            "have its author save the weights as safetensors"
        ) from error
    except Exception as error:  # of a file of another kind any byte is taken for an instruction
        raise UsageError(f"{path} is not a whole pickle of arrays ({error}): fetch it again") from error


def _tensors(content: object) -> object:
    if isinstance(content, dict):
        return {key: _tensors(value) for key, value in content.items()}
    if isinstance(content, np.ndarray) and content.dtype.kind in "biuf":
        return torch.from_numpy(np.array(content))
    return content
