"""The common style of the figures, and the one place that makes matplotlib's figures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_pipeline.files import write_atomically
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray[Any, Any] | torch.Tensor

MEAN, STD = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
BLUE, ORANGE, GREY, DARK = "#1f5fa8", "#c0562b", "#8a8a8a", "#222222"


def pictures_of(images: Array) -> np.ndarray:
    """Return RGB [N, H, W, 3] in [0, 1] of images [N, 3, H, W] that were normalised by ImageNet's mean and std."""
    return np.clip(as_array(images).transpose(0, 2, 3, 1) * STD + MEAN, 0, 1)


def as_array(value: Array) -> np.ndarray:
    """Return a float32 array of an array or a tensor on any device; NaN becomes 0."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    return np.nan_to_num(np.asarray(value, dtype=np.float32))


def new_figure(size_inches: tuple[float, float], dpi: int) -> Figure:
    """Return a figure drawn by Agg, independent of pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, whole or not at all, and make its folder."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=figure.dpi)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), content.getvalue())
