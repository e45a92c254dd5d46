"""What training asks of an engine, and an engine of an objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from data_pipeline.batches import Batch
from mae_scale.checkpoints.shards import EngineState


class Objective(Protocol):
    """A torch module from the tensors of a micro-batch to its mean loss; what is trained is inside it.

    With layer-wise lr decay also `layers`, their number, and `layer_of(name)`, the layer of a parameter from 0.
    """

    @property
    def never_decayed(self) -> AbstractSet[str]:
        """Last parts of the names of parameters that have no weight decay, such as `cls_token`."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks: what is compiled, checkpointed and sharded."""

    def draw(self, step: int, positions: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return what is drawn at random for `positions` int [B] of a step's global batch, on the host.

        A pure function of (seed, step, position); the loader calls it in its own thread.
        """

    def tensors(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Return what the module takes for a micro-batch, on the device."""


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


class Engine(Protocol):
    """An objective spread over the ranks, in its precision, with its optimiser."""

    name: str
    """In logs and checkpoints, such as `deepspeed ZeRO 2`."""
    config: dict[str, Any]
    """All its settings, as they are used."""

    def train_step(self, micro_batches: Iterable[tuple[torch.Tensor, ...]], lr: float) -> StepResult:
        """Do one update from `accumulation` micro-batches at learning rate lr."""

    def predict(self, *tensors: torch.Tensor) -> Any:
        """Return what the objective gives in evaluation mode. All ranks call it, equally often."""

    def averaged(self) -> AbstractContextManager[None]:
        """Return a block in which predict() uses the average of the weights, where one is kept. All ranks enter it."""

    def state(self) -> EngineState:
        """Return what this rank holds of the training state, as views of it."""

    def restored(self, scalars: dict[str, Any]) -> None:
        """Take over what was filled into the pieces of state(), and the scalars beside them. All ranks call it."""

    def close(self) -> None:
        """Give back what is held. All ranks call it."""
