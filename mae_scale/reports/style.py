"""What all figures are drawn with. The one module that makes matplotlib's figures."""

import io
from pathlib import Path

import numpy as np

from data_pipeline.files import write_atomically
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD

MEAN, STD = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)
BLUE, ORANGE, GREY, DARK = "#1f5fa8", "#c0562b", "#8a8a8a", "#222222"


def pictures_of(images) -> np.ndarray:
    """Images [N, 3, H, W], normalised by ImageNet's mean and standard deviation -> RGB [N, H, W, 3] in [0, 1]."""
    return np.clip(as_array(images).transpose(0, 2, 3, 1) * STD + MEAN, 0, 1)


def as_array(value) -> np.ndarray:
    """Return a float32 array of an array or a tensor on any device; what is not a number becomes 0."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    return np.nan_to_num(np.asarray(value, dtype=np.float32))


def new_figure(size_inches: tuple[float, float], dpi: int):
    """A figure drawn by Agg, apart from pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size_inches, dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure, path: Path) -> None:
    """Write the figure as a PNG, whole or not at all, and the folder it goes to."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=figure.dpi)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), content.getvalue())
