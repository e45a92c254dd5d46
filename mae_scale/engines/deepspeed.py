"""The DeepSpeed engine: ZeRO, precision, offload, accumulation. The one file that imports deepspeed."""

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from data_pipeline.errors import UsageError
from mae_scale.checkpoints.shards import EngineState
from mae_scale.config.schema import Recipe
from mae_scale.distributed.collectives import collective_timeout
from mae_scale.engines.base import StepResult
from mae_scale.engines.deepspeed_config import checks_gradients
from mae_scale.engines.deepspeed_state import DeepSpeedState
from mae_scale.engines.optimizers import (
    clip_gradients,
    optimizer_class,
    optimizer_options,
    parameter_groups,
    set_learning_rate,
    skip_if_not_finite,
)
from mae_scale.engines.policy import engine_name

OLDEST = (0, 19, 7)
"""The first DeepSpeed that has zero_optimization.compute_grad_norm (see ds_config.checks_gradients)."""


class DeepSpeedEngine:
    """An objective under DeepSpeed.

    An objective is a module whose forward takes the tensors of a micro-batch and returns its mean loss, and whose
    `never_decayed` names parameters that have no weight decay. Only what requires a gradient is trained and stored.
    """

    def __init__(self, objective: nn.Module, recipe: Recipe, config: dict[str, Any], device: torch.device):
        deepspeed = _deepspeed()
        with _quiet():
            deepspeed.init_distributed(dist_init_required=False, verbose=False)
        give_timeout(collective_timeout(recipe.engine.collective_timeout_s, device.type))
        objective.to(device)
        groups = parameter_groups(objective, recipe.optim)
        optimizer = optimizer_class(recipe.optim)(groups, **optimizer_options(recipe.optim))
        self.name = engine_name(recipe)
        self.config = config
        with _quiet():
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=objective, optimizer=optimizer, config=config, dist_init_required=False
            )
        self._optimizer, self._clip = optimizer, recipe.optim.clip_grad_norm
        self._checks = checks_gradients(config)
        self._ema = recipe.classifier.ema if recipe.classifier else None
        self._state = DeepSpeedState(self._engine, optimizer, ema=self._ema is not None)

    def train_step(self, micro_batches: Iterable[tuple[torch.Tensor, ...]], lr: float) -> StepResult:
        """One update from `accumulation` micro-batches at learning rate lr."""
        engine, losses = self._engine, []
        engine.train()
        set_learning_rate(self._optimizer, lr)
        norm: Callable[[], float] = engine.get_global_grad_norm
        skipped: Callable[[], bool] = self._overflowed
        for tensors in micro_batches:
            loss = engine(*tensors)
            engine.backward(loss)
            if self._checks and engine.is_gradient_accumulation_boundary():
                gradients = self._gradients()
                total = self._norm(gradients)
                norm, skipped = total.item, skip_if_not_finite(self._optimizer, total)
                clip_gradients(gradients, total, self._clip)
            engine.step()
            losses.append(loss.detach().float())
        if self._ema is not None:
            found = self._optimizer.found_inf if self._checks else float(self._overflowed())
            self._state.average((1 - self._ema) * (1 - found))
        return StepResult(torch.stack(losses).mean(), lambda: float(norm()), skipped)

    @torch.no_grad()
    def predict(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Return what the objective gives in evaluation mode. All ranks call it, equally often."""
        self._engine.eval()
        return self._engine(*tensors)

    def averaged(self) -> contextlib.AbstractContextManager:
        """Return a block in which predict() uses the average of the weights, where one is kept. All ranks enter it."""
        return contextlib.nullcontext() if self._ema is None else self._state.averaged()

    def state(self) -> EngineState:
        """Return what this rank holds of the training state, as views of it."""
        return self._state.state()

    def restored(self, scalars: dict[str, Any]) -> None:
        """To be called by all ranks when the pieces of state() were filled, with the scalars that lay beside them."""
        self._state.restored(scalars)

    def close(self) -> None:
        self._engine.destroy()

    def _overflowed(self) -> bool:
        return self._zero.overflow

    def _gradients(self) -> list[torch.Tensor]:
        """Return this rank's part of the gradient of the global batch, reduced; all of it without ZeRO."""
        if self._engine.zero_optimization_stage() == 0:
            return [p.grad for p in self._engine.module.parameters() if p.grad is not None]
        return [part for group in self._zero.averaged_gradients.values() for part in group]

    def _norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Return the L2 norm [] of the whole gradient, on the device; of its parts, those of all ranks."""
        norm = nn.utils.get_total_norm(gradients)
        if self._engine.zero_optimization_stage() == 0:
            return norm
        squares = norm.square()
        torch.distributed.all_reduce(squares)
        return squares.sqrt()


def give_timeout(timeout: timedelta) -> None:
    """Let DeepSpeed's own group of all ranks, which it would give torch's 30 minutes, time out as the others do."""
    from deepspeed.utils import groups

    if groups._WORLD_GROUP is None:
        groups._WORLD_GROUP = torch.distributed.new_group(timeout=timeout)


def _deepspeed():
    """DeepSpeed, imported late (it takes seconds) and quiet."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    for talkative in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    found = tuple(int(number) for number in re.findall(r"\d+", deepspeed.__version__)[:3])
    if found < OLDEST:
        raise UsageError(
            f"DeepSpeed {deepspeed.__version__} is installed; {'.'.join(map(str, OLDEST))} or newer is needed, which "
            "can leave the gradient's norm to the engine: pip install --upgrade deepspeed",
            on_all_ranks=True,
        )
    if not torch.cuda.is_available():
        # Else a C++ helper is compiled for up to 75 s at the first start: an all-reduce for inference in one machine's
        # memory. Training never calls it; all of its collectives are torch's.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextlib.contextmanager
def _quiet():
    """Without the lines that DeepSpeed prints, not logs, while it starts."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield
