"""The weights of a torch module that was pickled whole, without its class and without running code of the file.

`torch.save(module)` writes the names of classes and functions, and what they are given. Here whatever is of no library
that Python or torch brings becomes a stand-in that keeps its state and does nothing; of these libraries only what
rebuilds tensors is taken, and everything else is refused.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from mae_scale.models.weights.files import StateDict

_TAKEN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("torch", "device"): torch.device,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
}
"""What may be called: none of it runs what it is given."""
_MODULES = "torch.nn.modules."
"""Of torch's own: its layers, which become stand-ins too."""


class _StandIn:
    """What the file has an instance of; it keeps the state that it is given."""

    dump_patches = False
    """Asked for by torch, which compares a class with the source that old files have of it."""

    state: dict[str, Any]

    def __new__(cls, *arguments: object, **named: object) -> _StandIn:
        made = super().__new__(cls)
        made.state = {}
        return made

    def __setstate__(self, state: object) -> None:
        self.state = state if isinstance(state, dict) else {}


class _Refused(pickle.UnpicklingError):
    """The file names what could run code."""


class _Unpickler(pickle.Unpickler):
    """Unpickler that imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        # The names of Python 2, which torch's files have.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if (module, name) in _TAKEN:
            return _TAKEN[module, name]
        library = module.partition(".")[0]
        if (library in sys.stdlib_module_names or library == "torch") and not module.startswith(_MODULES):
            raise _Refused(f"it names {module}.{name}")
        return _StandIn


_PICKLE = SimpleNamespace(
    Unpickler=_Unpickler, load=lambda file, **named: _Unpickler(file, **named).load(), __name__="mae_scale"
)
"""What torch.load takes for the module pickle."""


def read_module(path: Path) -> StateDict:
    """Return the parameters and buffers of a pickled module by name, on the host.

    Raises UsageError when the file is missing, damaged, holds something else, or names what could run code.
    """
    if not path.is_file():
        raise UsageError(f"no file at {path}: expected a pickled torch module (.pkl)")
    try:
        with warnings.catch_warnings():  # that the source of a class has changed
            warnings.simplefilter("ignore")
            module = torch.load(path, map_location="cpu", pickle_module=_PICKLE, weights_only=False)
    except _Refused as error:
        raise UsageError(
            f"{path} was refused: {error}, which a module does not need and could run code when read; fetch it again, "
            "or have its author save the weights as safetensors"
        ) from error
    except Exception as error:  # of a file of another kind any byte is taken for an instruction
        raise UsageError(f"{path} is not a whole torch file ({error}): fetch it again") from error
    found = dict(_weights(module, "")) if isinstance(module, _StandIn) else {}
    if not found:
        raise UsageError(f"{path} holds no torch module with weights; expected one as torch.save(module) writes it")
    return found


def _weights(module: _StandIn, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for kind in ("_parameters", "_buffers"):
        for name, value in _items(module, kind):
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value.detach()
    for name, child in _items(module, "_modules"):
        if isinstance(child, _StandIn):
            yield from _weights(child, f"{prefix}{name}.")


def _items(module: _StandIn, kind: str) -> list[tuple[Any, Any]]:
    found = module.state.get(kind)
    return list(found.items()) if isinstance(found, dict) else []
