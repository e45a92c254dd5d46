"""The FairScale engine: sharded optimiser with DDP (1), or fully sharded (3). The one file that imports fairscale."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from data_pipeline.batch_layout import BatchLayout
from mae_scale.checkpoints.shards import MOMENTUM, EngineState, Piece, share_of
from mae_scale.config.schema import Recipe
from mae_scale.engines.base import Objective, StepResult
from mae_scale.engines.deepspeed_state import buffer_pieces
from mae_scale.engines.host_copy import HostCopy
from mae_scale.engines.momentum import Followers, move_averages
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


class FairScaleEngine:
    """An objective under FairScale.

    Stage 1 is OSS under torch's DDP. Stage 3 is FullyShardedDataParallel, one shard per block, and needs a GPU.
    bf16 is torch's autocast over float32 parameters.
    """

    def __init__(
        self,
        objective: Objective,
        recipe: Recipe,
        layout: BatchLayout,
        *,
        stage: int,
        precision: str,
        device: torch.device,
    ):
        self.name = engine_name(recipe)
        self.config = {"backend": "fairscale", "zero_stage": stage, "precision": precision}
        self.objective = objective.to(device)
        self._clip, self._accumulation = recipe.optim.clip_grad_norm, layout.accumulation
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        # Grouped before sharding: a shard has one dimension, whatever its parameter had.
        groups = parameter_groups(objective, recipe.optim)
        kind, options = optimizer_class(recipe.optim), optimizer_options(recipe.optim)
        self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self._shapes = {p: p.shape for p in self._parameters.values()}
        self._sharded = stage == 3
        # FairScale has no types: what it adds to a module and to an optimiser is not known.
        self._model: Any
        self._optimizer: Any
        if self._sharded:
            self._model = _fully_sharded(objective)
            self._optimizer = kind(groups, **options)
        else:
            from fairscale.optim import OSS

            self._model = nn.parallel.DistributedDataParallel(objective)
            self._optimizer = OSS(groups, optim=kind, **options)
        optimizer = self._own_optimizer()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                momentum = bool(objective.followers)
                optimizer.state[parameter] = fresh_state(optimizer, parameter, ema=False, momentum=momentum)
        if objective.followers:
            own = [(name, optimizer.state[p]) for name, p in self._parameters.items() if p in optimizer.state]
            held = [Piece(name, 0, state[MOMENTUM].view(-1)) for name, state in own]
            self._followers = Followers(held, objective.followers, dtype=torch.float32, replicated=False)

    def train_step(
        self, micro_batches: Iterable[tuple[torch.Tensor, ...]], lr: float, decay: float | None = None
    ) -> StepResult:
        """Do one update from `accumulation` micro-batches at learning rate lr, after the followers' average's."""
        self._model.train()
        if decay is not None:
            self._follow(decay)
        self._optimizer.zero_grad(set_to_none=True)
        set_learning_rate(self._optimizer, lr)
        losses = []
        for number, tensors in enumerate(micro_batches, start=1):
            last = number == self._accumulation
            with nullcontext() if last else self._model.no_sync():
                with self._autocast:
                    loss = self._model(*tensors)
                (loss / self._accumulation).backward()
            losses.append(loss.detach().float())
        limit = self._clip or float("inf")
        if self._sharded:
            norm = self._model.clip_grad_norm_(limit)
        else:
            # DDP leaves the whole gradient on every rank, so torch's own clipping is the global one.
            norm = nn.utils.clip_grad_norm_(self.objective.parameters(), limit)
        skipped = HostCopy(skip_if_not_finite(self._own_optimizer(), norm))
        self._optimizer.step()
        return StepResult(torch.stack(losses).mean(), norm.item, skipped)

    @torch.no_grad()
    def predict(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Return what the objective gives in evaluation mode. All ranks call it, equally often."""
        self._model.eval()
        with self._autocast:
            return self._model(*tensors)

    def averaged(self) -> AbstractContextManager[None]:
        """Return a block that changes nothing: no average is kept here (refuse_wrong_combinations)."""
        return nullcontext()

    def state(self) -> EngineState:
        """Return what this rank holds of the training state, as views of it."""
        buffers = buffer_pieces(self.objective)
        pieces, own = list(buffers), share_of(buffers, self._rank, self._world_size)
        optimizer = self._own_optimizer()
        steps = None
        for name, parameter in self._parameters.items():
            start, n = self._place(parameter)
            piece = Piece(f"weight/{name}", start, parameter.detach().view(-1)[:n])
            pieces.append(piece)
            if state := optimizer.state.get(parameter):
                # With OSS all ranks have all weights, and the one that has a parameter's moments writes it.
                steps = int(state["step"]) if "step" in state else None
                kept = [Piece(f"{key}/{name}", start, value.view(-1)[:n]) for key, value in moments(state).items()]
                pieces += kept
                own += [piece, *kept]
        return EngineState(pieces, own, {"optimizer_steps": steps, "loss_scaler": None})

    def restored(self, scalars: dict[str, Any]) -> None:
        """Take over what was filled into the pieces of state(), and the scalars beside them. All ranks call it."""
        for state in self._own_optimizer().state.values():
            if "step" in state:
                state["step"].fill_(scalars["optimizer_steps"])

    def close(self) -> None:
        """Do nothing: only memory is held."""

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        """Move the momentum encoder's average towards the weights, and the followers with it."""
        states = self._own_optimizer().state
        move_averages([state[MOMENTUM] for state in states.values()], [p.detach() for p in states], decay)
        self._followers.fill()

    def _place(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return (start, n): this rank has elements [start, start + n) of a parameter, all unless fully sharded."""
        size = self._shapes[parameter].numel()
        if not self._sharded:
            return 0, size
        shard = -(-size // self._world_size)  # the last shards are padded, or nothing but padding
        start = min(self._rank * shard, size)
        return start, min(shard, size - start)

    def _own_optimizer(self) -> torch.optim.Optimizer:
        """Return torch's optimiser over this rank's parameters."""
        own: torch.optim.Optimizer = self._optimizer if self._sharded else self._optimizer.optim
        return own


def checkpoint_with_offload(block: nn.Module) -> None:
    """Wrap a block in place: its inputs wait in host memory, the rest is computed again in the backward pass."""
    from fairscale.nn import checkpoint_wrapper

    checkpoint_wrapper(block, offload_to_cpu=True)


def _fully_sharded(objective: Objective) -> Any:
    """Return the objective as FullyShardedDataParallel, each of its blocks a shard of its own."""
    from fairscale.nn import FullyShardedDataParallel, auto_wrap, enable_wrap

    blocks = set(objective.blocks)
    # Unflattened, for the parameter groups hold the parameters themselves.
    options = {"flatten_parameters": False, "reshard_after_forward": True}
    with enable_wrap(
        wrapper_cls=FullyShardedDataParallel,
        auto_wrap_policy=lambda module, recurse, **_: recurse or module in blocks,
        **options,
    ):
        return FullyShardedDataParallel(auto_wrap(objective), **options)
