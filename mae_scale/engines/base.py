"""What training asks of an engine."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


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
