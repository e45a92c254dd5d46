"""GPUs and the links between them: rates from their data sheets (hardware.yaml)."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UsageError

DATA = Path(__file__).with_name("hardware.yaml")
DEFAULT_LINK = "infiniband-8x400"
"""Between nodes, where nothing else is said."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it; units as in hardware.yaml."""

    name: str
    match: str
    tflops: dict[str, float]
    memory_gb: float
    memory_gb_s: float
    processors: int
    link: str
    power_w: float
    source: str


@dataclass(frozen=True)
class Link:
    """A link, in one direction; units as in hardware.yaml."""

    name: str
    gb_s: float
    latency_us: float
    source: str


@cache
def _data() -> dict[str, Any]:
    return yaml.safe_load(DATA.read_text(encoding="utf-8"))


@cache
def gpus() -> dict[str, Gpu]:
    """Return the GPUs by name; those whose driver's name contains another's come first."""
    return {name: Gpu(name=name, **values) for name, values in _data()["gpus"].items()}


@cache
def links() -> dict[str, Link]:
    """Return the links by name."""
    return {name: Link(name=name, **values) for name, values in _data()["links"].items()}


def gpu_named(name: str) -> Gpu:
    """Return a GPU by its name in hardware.yaml. Raises UsageError, with the nearest name, when it has none such."""
    return _named("GPU", name, gpus())


def link_named(name: str) -> Link:
    """Return a link by its name in hardware.yaml. Raises UsageError, with the nearest name, when it has none such."""
    return _named("link", name, links())


def gpu_of_device(device_name: str) -> Gpu | None:
    """Return the GPU of a `torch.cuda.get_device_name()`, in any case; None for one that is not in hardware.yaml."""
    name = device_name.lower()
    # Not before a digit: an RTX A4000 is no A40.
    return next((gpu for gpu in gpus().values() if re.search(rf"{re.escape(gpu.match.lower())}(?!\d)", name)), None)


def gpu_in(text: str) -> Gpu | None:
    """Return the GPU that a text names as hardware.yaml does, or as Slurm and drivers do (nvidia_h100_80gb_hbm3)."""
    return gpus().get(text.lower()) or gpu_of_device(text.replace("_", " "))


def peak_flops_per_s(device_name: str, precision: str = "bf16") -> float | None:
    """Return a GPU's dense peak in FLOP/s by its `torch.cuda.get_device_name()`, for "bf16", "fp16" or "fp32".

    None for a device that is not in the table, or has no units for that precision (bf16 on V100).
    """
    gpu = gpu_of_device(device_name)
    return gpu.tflops[precision] * 1e12 if gpu is not None and precision in gpu.tflops else None


def _named(kind: str, name: str, known: dict[str, Any]) -> Any:
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"{kind} {name} is not known{meant} Expected one of {', '.join(known)}".replace("?.", "?"))
