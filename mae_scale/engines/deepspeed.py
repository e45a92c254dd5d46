"""The DeepSpeed engine: ZeRO, precision, offload, accumulation."""

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from mae_scale.checkpoints.shards import EngineState
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import collective_timeout
from mae_scale.engines.base import Objective, StepResult
from mae_scale.engines.deepspeed_build import import_deepspeed, join_process_group, set_environment, without_prints
from mae_scale.engines.deepspeed_config import checks_gradients
from mae_scale.engines.deepspeed_state import DeepSpeedState
from mae_scale.engines.host_copy import HostCopy
from mae_scale.engines.optimizers import (
    clip_gradients,
    optimizer_class,
    optimizer_options,
    parameter_groups,
    set_learning_rate,
    skip_if_not_finite,
)
from mae_scale.engines.policy import engine_name


class DeepSpeedEngine:
    """An objective under DeepSpeed; only parameters that require a gradient are trained and stored."""

    def __init__(self, objective: Objective, recipe: Recipe, config: dict[str, Any], device: torch.device):
        set_environment()
        deepspeed = import_deepspeed()
        join_process_group(deepspeed, collective_timeout(recipe.engine.collective_timeout_s, device.type))
        objective.to(device)
        groups = parameter_groups(objective, recipe.optim)
        optimizer = optimizer_class(recipe.optim)(groups, **optimizer_options(recipe.optim))
        self.name = engine_name(recipe)
        self.config = config
        with without_prints():
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=objective, optimizer=optimizer, config=config, dist_init_required=False
            )
        if self._engine.zero_optimization_stage() == 0 and torch.distributed.get_world_size() == 1:
            # DeepSpeed would copy all gradients into a buffer and back.
            self._engine.enable_backward_allreduce = False
        self._optimizer, self._clip = optimizer, recipe.optim.clip_grad_norm
        self._checks = checks_gradients(config)
        self._ema = recipe.classifier.ema if recipe.classifier else None
        self._state = DeepSpeedState(self._engine, optimizer, ema=self._ema is not None, followers=objective.followers)

    def train_step(
        self, micro_batches: Iterable[tuple[torch.Tensor, ...]], lr: float, decay: float | None = None
    ) -> StepResult:
        """Do one update from `accumulation` micro-batches at learning rate lr, after the followers' average's."""
        engine, losses = self._engine, []
        engine.train()
        if decay is not None:
            self._state.follow(decay)
        set_learning_rate(self._optimizer, lr)
        norm: Callable[[], float] = engine.get_global_grad_norm
        skipped: Callable[[], bool | float] = self._overflowed
        found: torch.Tensor | None = None  # where the engine looks for non-finite gradients itself
        for tensors in micro_batches:
            loss = engine(*tensors)
            engine.backward(loss)
            if self._checks and engine.is_gradient_accumulation_boundary():
                gradients = self._gradients()
                total = self._norm(gradients)
                found = skip_if_not_finite(self._optimizer, total)
                norm, skipped = total.item, HostCopy(found)
                clip_gradients(gradients, total, self._clip)
            engine.step()
            losses.append(loss.detach().float())
        if self._ema is not None:
            left_out = float(self._overflowed()) if found is None else found
            self._state.average((1 - self._ema) * (1 - left_out))
        return StepResult(torch.stack(losses).mean(), lambda: float(norm()), skipped)

    @torch.no_grad()
    def predict(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Return what the objective gives in evaluation mode. All ranks call it, equally often."""
        self._engine.eval()
        return self._engine(*tensors)

    def averaged(self) -> AbstractContextManager[None]:
        """Return a block in which predict() uses the average of the weights, where one is kept. All ranks enter it."""
        return contextlib.nullcontext() if self._ema is None else self._state.averaged()

    def state(self) -> EngineState:
        """Return what this rank holds of the training state, as views of it."""
        return self._state.state()

    def restored(self, scalars: dict[str, Any]) -> None:
        """Take over what was filled into the pieces of state(), and the scalars beside them. All ranks call it."""
        self._state.restored(scalars)

    def close(self) -> None:
        """Destroy DeepSpeed's engine. All ranks call it."""
        self._engine.destroy()

    def _overflowed(self) -> bool:
        return bool(self._zero.overflow)

    def _gradients(self) -> list[torch.Tensor]:
        """Return this rank's part of the gradient of the global batch, reduced; all of it without ZeRO."""
        if self._engine.zero_optimization_stage() == 0:
            return [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return [part for group in self._zero.averaged_gradients.values() for part in group]

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Return the L2 norm [] of the whole gradient, over the parts of all ranks, on the device."""
        norm = nn.utils.get_total_norm(gradients)
        if self._engine.zero_optimization_stage() == 0:
            return norm
        squares = norm.square()
        torch.distributed.all_reduce(squares)
        return squares.sqrt()
