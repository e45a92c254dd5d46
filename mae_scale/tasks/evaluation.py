"""What evaluations of every task have in common: their file, the ranks that measure together, the model on a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import UsageError
from mae_scale.config.required import required
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.heartbeat import Control
from mae_scale.distributed.ranks import Ranks, ranks_from_environment
from mae_scale.engines.policy import precision_of

EVALUATION = "evaluation.json"
"""The last evaluation of a run, in its folder."""
Predict = Callable[..., Any]
"""A model's inputs to its output in evaluation mode, on the device."""


@dataclass(frozen=True)
class Asked:
    """What `mae-scale evaluate` is asked for beside the numbers."""

    set_kind: str = "folder"
    """The layout of data.val_root, for a classifier."""
    figure: Path | None = None
    """PNG of predictions over images."""
    predictions: Path | None = None
    """COCO's results of a detector, or a folder of a segmenter's label maps."""

    def check_dense(self, suffix: str) -> None:
        """Raise UsageError for what a detector or a segmenter cannot write; `suffix`: how predictions' name ends."""
        if self.set_kind != "folder":
            raise UsageError(f"--set {self.set_kind} is of a classifier; drop it")
        for option, path, expected in (
            ("--figure", self.figure, ".png"),
            ("--predictions", self.predictions, suffix),
        ):
            if path is None:
                continue
            fits = path.suffix == expected if expected else not path.is_file()
            if not (fits and path.absolute().parent.is_dir()):
                form = f"a name that ends in {expected}" if expected else "a folder"
                raise UsageError(f"{option} {path}: expected {form}, in a folder that exists")


@contextlib.contextmanager
def all_ranks(recipe: Recipe) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the ranks that evaluate together; yield this one's place and device."""
    ranks, timeout_s = ranks_from_environment(), recipe.engine.collective_timeout_s
    with process_group(ranks, timeout_s) as device, Control(ranks, timeout_s):
        yield ranks, device


def predictor(model: torch.nn.Module, recipe: Recipe, device: torch.device) -> Predict:
    """Return the model on the device as a function of its inputs, in the recipe's precision by autocast."""
    precision = precision_of(recipe, gpu=device.type == "cuda")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    model.to(device).eval()

    def predict(*inputs: torch.Tensor) -> Any:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = model(*inputs)
            return output.float() if isinstance(output, torch.Tensor) else output

    return predict


def unread(results: dict[str, Any]) -> str:
    """Return how many images could not be read, for a sentence; nothing when all could."""
    return f" ({results['left_out']:,} more cannot be read)" if results["left_out"] else ""


def validation_root(recipe: Recipe, form: str = "") -> Path:
    """Return data.val_root. Raises UsageError when it is not set; `form`: that of the folder, for its advice."""
    return required(recipe.data.val_root, "data.val_root", f"add data.val_root=/path/to/images{form}")
