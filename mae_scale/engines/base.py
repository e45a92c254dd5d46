"""The interfaces of an engine, which training uses, and of an objective, which engines use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from data_pipeline.batches import Batch
from mae_scale.checkpoints.shards import EngineState


class Objective(nn.Module, ABC):
    """A torch module from the tensors of a micro-batch to its mean loss; it contains all that is trained.

    A subclass sets `never_decayed`, and for layer-wise lr decay also defines `layers` and layer_of().
    """

    never_decayed: AbstractSet[str]
    """Last parts of the names of parameters that have no weight decay, such as `cls_token`."""

    @property
    @abstractmethod
    def blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks: what is compiled, checkpointed and sharded."""

    @property
    def layers(self) -> int:
        """Number of layers for layer-wise lr decay."""
        raise NotImplementedError

    def layer_of(self, name: str) -> int:
        """Return the layer, from 0, of a parameter."""
        raise NotImplementedError

    @property
    def followers(self) -> Mapping[str, nn.Parameter]:
        """What the engine fills before each step, with a moving average of the trained parameters of these names.

        They are not among the module's own parameters: a momentum encoder's.
        """
        return {}

    @property
    def untrained_blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks without gradients, which are compiled only."""
        return ()

    @abstractmethod
    def draw(self, step: int, positions: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return what is drawn at random for `positions` int [B] of a step's global batch, on the host.

        A pure function of (seed, step, position); the loader calls it in its own thread.
        """

    @abstractmethod
    def tensors(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Return the arguments of forward() for a micro-batch, on the device."""


@dataclass(frozen=True)
class StepResult:
    """Result of one optimiser step on this rank."""

    loss: torch.Tensor
    """[] float32 on the device: the mean over this rank's micro-batches."""
    grad_norm: Callable[[], float]
    """The L2 norm of the whole unclipped gradient; reading it may wait for the device."""
    skipped: Callable[[], bool | float]
    """True where the gradient was not finite, so that nothing was updated; the same on every rank. Reading it waits for
    this step, and not for one that has been launched since."""


class Engine(Protocol):
    """An objective spread over the ranks, in its precision, with its optimiser."""

    name: str
    """Name in logs and checkpoints, such as `deepspeed ZeRO 2`."""
    config: dict[str, Any]
    """All settings in use."""

    def train_step(
        self, micro_batches: Iterable[tuple[torch.Tensor, ...]], lr: float, decay: float | None = None
    ) -> StepResult:
        """Do one update from `accumulation` micro-batches at learning rate lr.

        decay: of the average in the objective's `followers`, which is moved first; None: it stays as it is.
        """

    def predict(self, *tensors: torch.Tensor) -> Any:
        """Return the objective's output in evaluation mode. All ranks call it, equally often."""

    def averaged(self) -> AbstractContextManager[None]:
        """Return a block in which predict() uses the average of the weights, where one is kept. All ranks enter it."""

    def state(self) -> EngineState:
        """Return this rank's part of the training state, as views of it."""

    def restored(self, scalars: dict[str, Any]) -> None:
        """Adopt the values copied into the pieces of state(), and the scalars beside them. All ranks call it."""

    def close(self) -> None:
        """Release all resources. All ranks call it."""
