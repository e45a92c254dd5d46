"""The engine of plain torch: DistributedDataParallel in float32, all weights and moments on every rank."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from data_pipeline.batch_layout import BatchLayout
from mae_scale.checkpoints.shards import EngineState, Piece, share_of
from mae_scale.config.schema import Recipe
from mae_scale.engines.base import Objective, StepResult
from mae_scale.engines.deepspeed_state import buffer_pieces
from mae_scale.engines.host_copy import HostCopy
from mae_scale.engines.optimizers import (
    fresh_state,
    moments,
    optimizer_class,
    optimizer_options,
    parameter_groups,
    set_learning_rate,
    skip_if_not_finite,
)
from mae_scale.engines.policy import engine_name


class DataParallelEngine:
    """An objective under torch's DistributedDataParallel; see `mae_scale.engines.base.Engine`."""

    def __init__(self, objective: Objective, recipe: Recipe, layout: BatchLayout, device: torch.device):
        self.name = engine_name(recipe)
        self.config = {"backend": "ddp", "precision": "fp32"}
        self.objective = objective.to(device)
        self._clip, self._accumulation = recipe.optim.clip_grad_norm, layout.accumulation
        self._parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        groups = parameter_groups(objective, recipe.optim)
        self._optimizer = optimizer_class(recipe.optim)(groups, **optimizer_options(recipe.optim))
        for parameter in self._parameters.values():  # state() shows the moments before the first step, too
            self._optimizer.state[parameter] = fresh_state(self._optimizer, parameter, ema=False)
        self._model = nn.parallel.DistributedDataParallel(objective)

    def train_step(
        self, micro_batches: Iterable[tuple[torch.Tensor, ...]], lr: float, decay: float | None = None
    ) -> StepResult:
        """Do one update from `accumulation` micro-batches at learning rate lr; decay is of tasks that it refuses."""
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        set_learning_rate(self._optimizer, lr)
        losses = []
        for number, tensors in enumerate(micro_batches, start=1):
            last = number == self._accumulation  # only then are gradients averaged over the ranks
            with contextlib.nullcontext() if last else self._model.no_sync():
                loss = self._model(*tensors)
                (loss / self._accumulation).backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self._clip or float("inf"))
        skipped = HostCopy(skip_if_not_finite(self._optimizer, norm))
        self._optimizer.step()
        return StepResult(torch.stack(losses).mean(), norm.item, skipped)

    @torch.no_grad()
    def predict(self, *tensors: torch.Tensor) -> Any:
        """Return the objective's output in evaluation mode."""
        self.objective.eval()
        return self.objective(*tensors)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Return an empty block: no average of the weights is kept (refuse_wrong_combinations)."""
        return contextlib.nullcontext()

    def state(self) -> EngineState:
        """Return the training state: every rank needs all of it, and writes its share."""
        pieces, steps = buffer_pieces(self.objective), None
        for name, parameter in self._parameters.items():
            state = self._optimizer.state[parameter]
            steps = int(state["step"]) if "step" in state else None  # LARS has none
            kept = {"weight": parameter.detach(), **moments(state)}
            pieces += [Piece(f"{key}/{name}", 0, value.view(-1)) for key, value in kept.items()]
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return EngineState(pieces, share_of(pieces, rank, world_size), {"optimizer_steps": steps, "loss_scaler": None})

    def restored(self, scalars: dict[str, Any]) -> None:
        """Adopt the step count; the pieces were filled in place."""
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(scalars["optimizer_steps"])

    def close(self) -> None:
        """Release nothing: only memory is held."""
