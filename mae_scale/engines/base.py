"""What training asks of an engine, and an engine of an objective."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from data_pipeline.loader import Batch


@dataclass(frozen=True)
class StepResult:
    """One optimiser step of this rank."""

    loss: torch.Tensor
    """[] float32 on the device: the mean over this rank's micro-batches."""
    grad_norm: Callable[[], float]
    """The L2 norm of the whole unclipped gradient; reading it may wait for the device."""
    skipped: Callable[[], bool | float]
    """Whether the gradient was not finite, and so nothing was updated; the same on every rank. Reading it waits for
    this step, and not for one that has been launched since."""


class Objective(Protocol):
    """A torch module from a micro-batch's tensors to its mean loss."""

    def draw(self, step: int, positions: np.ndarray) -> tuple[torch.Tensor, ...]: ...

    def tensors(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, ...]: ...


class Engine(Protocol):
    """An objective spread over the ranks."""

    name: str
    config: dict

    def train_step(self, micro_batches: Iterable[tuple[torch.Tensor, ...]], lr: float) -> StepResult: ...
