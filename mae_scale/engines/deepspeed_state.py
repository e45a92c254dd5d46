"""The places where DeepSpeed keeps a rank's float32 weights and moments, for every ZeRO stage and precision.

DeepSpeed's own checkpoints are not used: they carry over several silent errors (one `step` for all groups of a
universal checkpoint, a flipped byte loads), need a conversion for another number of ranks and cannot be written in
the background. Only the places are taken from DeepSpeed; tests compare whole runs, so they notice a release that moves
them.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mae_scale.checkpoints.shards import EMA, MOMENTUM, EngineState, Piece, share_of
from mae_scale.engines.momentum import Followers, move_averages
from mae_scale.engines.optimizers import fresh_state, moments

LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Fragment:
    """This rank's elements [start, start + n) of a parameter: [offset, offset + n) of a flat float32 master."""

    name: str
    start: int
    master: torch.Tensor
    offset: int
    n: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the fragment's elements of a tensor with the master's layout."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.n)


class DeepSpeedState:
    """View of a DeepSpeed engine's training state; it owns no tensors."""

    def __init__(
        self,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        *,
        ema: bool,
        followers: Mapping[str, torch.nn.Parameter] | None = None,
    ):
        """engine: DeepSpeed's, which has no types; optimizer: torch's, which the engine has wrapped; its state is made
        here, with moments and step count 0; ema: an average of the weights is kept beside them; followers: what is
        to follow another average of the parameters of these names, in the precision of the engine's module.

        DeepSpeed's bf16 and fp16 optimiser without ZeRO makes an empty first step, which would put the bias
        correction one step ahead.
        """
        self._engine, self._zero, self._optimizer = engine, engine.optimizer, optimizer
        self._stage = engine.zero_optimization_stage()
        self._fragments = list(self._find_fragments())
        self._masters = list({id(f.master): f.master for f in self._fragments}.values())
        for master in self._masters:
            optimizer.state[master] = fresh_state(optimizer, master, ema=ema, momentum=bool(followers))
        if followers:
            held = [Piece(f.name, f.start, f.of(optimizer.state[f.master][MOMENTUM])) for f in self._fragments]
            dtype = next(engine.module.parameters()).dtype
            self._followers = Followers(held, followers, dtype=dtype, replicated=self._stage == 0)

    def state(self) -> EngineState:
        """Return this rank's pieces and scalars."""
        pieces = []
        for f in self._fragments:
            pieces.append(Piece(f"weight/{f.name}", f.start, f.of(f.master)))
            kept = moments(self._optimizer.state[f.master])
            pieces += [Piece(f"{key}/{f.name}", f.start, f.of(value)) for key, value in kept.items()]
        buffers = buffer_pieces(self._engine.module)
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        replicated = self._stage == 0
        own = share_of(pieces, rank, world_size) if replicated else list(pieces)
        own += share_of(buffers, rank, world_size)
        # A rank without a master (fewer elements than ranks) has no step count of its own: rank 0 always has one.
        # LARS has none at all.
        states = [self._optimizer.state[master] for master in self._masters]
        steps = [int(state["step"]) for state in states[:1] if "step" in state]
        scaler = self._loss_scaler()
        scalars = {
            "optimizer_steps": steps[0] if steps else None,
            "loss_scaler": {k: getattr(scaler, k) for k in LOSS_SCALER if hasattr(scaler, k)} if scaler else None,
        }
        return EngineState([*pieces, *buffers], own, scalars)

    def restored(self, scalars: dict[str, Any]) -> None:
        """Set step counts and loss scale, and the weights from the masters, after the pieces were filled."""
        for master in self._masters:
            if "step" in self._optimizer.state[master]:
                self._optimizer.state[master]["step"].fill_(scalars["optimizer_steps"])
        if scalars["loss_scaler"] and (scaler := self._loss_scaler()):
            for key, value in scalars["loss_scaler"].items():
                setattr(scaler, key, value)
        self._refresh()

    @torch.no_grad()
    def average(self, weight: float | torch.Tensor) -> None:
        """Move the average of the weights towards them: ema += weight x (weights - ema)."""
        for master in self._masters:
            self._optimizer.state[master][EMA].lerp_(master, weight)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the momentum encoder's average towards the weights, and the followers with it. All ranks call it."""
        move_averages([self._optimizer.state[master][MOMENTUM] for master in self._masters], self._masters, decay)
        self._followers.fill()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Return a block in which the model has the average in place of its weights. All ranks enter it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for master in self._masters:
            average = self._optimizer.state[master][EMA]
            weights = master.clone()
            master.copy_(average)
            average.copy_(weights)
        self._refresh()

    def _refresh(self) -> None:
        """Set the weights that the model computes with from the masters."""
        zero = self._zero
        with torch.no_grad():
            if self._stage == 3:
                # What is still gathered, from a forward pass without a step after it, would not be gathered anew.
                zero.parameter_offload.partition_all_parameters()
                for group in range(len(zero.fp16_groups)):
                    zero._reassign_or_swap_out_partitioned_parameters(group)
                if zero.persistent_parameters:
                    zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            elif self._stage in (1, 2):
                zero.update_lp_params()
            elif zero is not self._optimizer:
                for low, full in self._pairs():
                    low.copy_(full)

    def _find_fragments(self) -> Iterator[Fragment]:
        zero = self._zero
        names = {p: name for name, p in self._engine.module.named_parameters() if p.requires_grad}
        if self._stage == 3:
            rank = torch.distributed.get_rank()
            for p, name in names.items():
                group, offset, n = zero.grad_position[zero.get_param_id(p)]
                start = rank * n
                if (held := min(n, p.ds_numel - start)) > 0:  # the last shards are padded, or nothing but padding
                    yield Fragment(name, start, zero.fp32_partitioned_groups_flat[group], offset, held)
        elif self._stage in (1, 2):
            ours = hasattr(zero, "single_partition_of_fp32_groups")  # else the bf16 optimiser of ZeRO 1
            masters = zero.single_partition_of_fp32_groups if ours else zero.fp32_groups_flat_partition
            for p, name in names.items():
                if (place := p._hp_mapping) is not None:
                    master, hp, lp = (
                        masters[place.param_group_index],
                        place.hp_fragment_address,
                        place.lp_fragment_address,
                    )
                    yield Fragment(name, lp.start, master, hp.start, lp.numel)
        elif zero is self._optimizer:
            for p, name in names.items():
                yield Fragment(name, 0, p, 0, p.numel())
        else:
            for low, full in self._pairs():
                yield Fragment(names[low], 0, full, 0, full.numel())

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each low-precision weight with its float32 master, without ZeRO."""
        for low, full in zip(self._zero.fp16_groups, self._zero.fp32_groups, strict=True):
            yield from zip(low, full, strict=True)

    def _loss_scaler(self) -> Any | None:
        """Return DeepSpeed's dynamic loss scaler in fp16; else None."""
        if not self._engine.fp16_enabled():
            return None
        return getattr(self._zero, "loss_scaler", None) or self._zero.loss_scale_config


def buffer_pieces(module: torch.nn.Module) -> list[Piece]:
    """Return the persistent buffers of a module, of which every rank has all elements."""
    persistent = module.state_dict(keep_vars=True).keys() - dict(module.named_parameters()).keys()
    buffers = dict(module.named_buffers())
    return [Piece(f"buffer/{name}", 0, buffers[name].view(-1)) for name in sorted(persistent) if name in buffers]
