"""MoCo v3's objective: tell the other view of each image from those of all other images of the global batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mae_scale.engines.base import Objective
from mae_scale.models.moco import Moco, contrast

if TYPE_CHECKING:
    from typing_extensions import Self

    from data_pipeline.batches import Batch


class Contrast(Objective):
    """InfoNCE of two views' queries and keys (Chen et al., algorithm 1).

    The momentum encoder is not one of its modules, so that engines do not shard, store or convert it as they do what
    is trained: they fill it from the average that they keep (`followers`).
    """

    never_decayed = frozenset(("cls_token",))

    def __init__(self, model: Moco, *, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature
        self._momentum_encoder = (model.momentum_encoder(),)

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks of the trained encoder: what is compiled, checkpointed and sharded."""
        return list(self.model.encoder.blocks)

    @property
    def untrained_blocks(self) -> list[nn.Module]:
        """Transformer blocks of the momentum encoder."""
        (averaged,) = self._momentum_encoder
        return list(averaged.encoder.blocks)

    @property
    def followers(self) -> Mapping[str, nn.Parameter]:
        """The momentum encoder's parameters, by the names of those that they are an average of."""
        (averaged,) = self._momentum_encoder
        return {f"model.{name}": parameter for name, parameter in averaged.named_parameters()}

    def draw(self, step: int, positions: np.ndarray) -> tuple[Tensor, ...]:
        """Return nothing: both views are drawn in the data pipeline."""
        return ()

    def tensors(self, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
        """Return the two views [B, 3, S, S], float32 on the device."""
        assert batch.second is not None
        return tuple(view.to(device, non_blocking=True) for view in (batch.images, batch.second))

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """Two views [B, 3, S, S] of this rank's images -> the loss, [] float32; all ranks together.

        In evaluation mode images [B, 3, S, S] -> the encoder's features, the cls token after its norm [B, D].
        """
        if second is None:
            return self.model.features(first)
        (averaged,) = self._momentum_encoder
        with torch.no_grad():
            keys = averaged.project(first, second)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return contrast(self.model.queries(first, second), keys, self.temperature, rank)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the module, and the momentum encoder with it."""
        super()._apply(fn, recurse)
        (averaged,) = self._momentum_encoder
        averaged._apply(fn, recurse)
        return self
