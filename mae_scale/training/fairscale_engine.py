"""The FairScale engine: sharded optimiser with DDP (1), or fully sharded (3). The one file that imports fairscale."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from mae_scale.recipe import Recipe
from mae_scale.training.ds_config import BatchLayout
from mae_scale.training.engine import StepResult
from mae_scale.training.optimizers import adamw_options, parameter_groups, set_learning_rate


class FairScaleEngine:
    """An objective under FairScale; the same interface as DeepSpeedEngine.

    Stage 1 is OSS under torch's DDP. Stage 3 is FullyShardedDataParallel, a shard a block, and needs a GPU.
    bf16 is torch's autocast over float32 parameters.
    """

    def __init__(
        self, objective: nn.Module, recipe: Recipe, layout: BatchLayout, *, stage: int, precision: str, device
    ):
        self.name = "fairscale " + ("fully sharded" if stage == 3 else "OSS with DDP")
        self.config = {"backend": "fairscale", "zero_stage": stage, "precision": precision}
        self.objective = objective.to(device)
        self._clip, self._accumulation = recipe.optim.clip_grad_norm, layout.accumulation
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        # Grouped before sharding: a shard has one dimension, whatever its parameter had.
        groups = parameter_groups(objective, recipe.optim.weight_decay, objective.never_decayed)
        self._sharded = stage == 3
        if self._sharded:
            self._model = _fully_sharded(objective)
            self._optimizer = torch.optim.AdamW(groups, **adamw_options(recipe.optim))
        else:
            from fairscale.optim import OSS

            self._model = nn.parallel.DistributedDataParallel(objective)
            self._optimizer = OSS(groups, optim=torch.optim.AdamW, **adamw_options(recipe.optim))

    def train_step(self, micro_batches: Iterable[tuple[torch.Tensor, ...]], lr: float) -> StepResult:
        """One update from `accumulation` micro-batches at learning rate lr."""
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        set_learning_rate(self._optimizer, lr)
        losses = []
        for number, tensors in enumerate(micro_batches, start=1):
            last = number == self._accumulation
            with contextlib.nullcontext() if last else self._model.no_sync():
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
        self._optimizer.step()
        return StepResult(torch.stack(losses).mean(), norm.item)

    def save(self, folder: Path) -> None:
        """Every rank writes its part: its optimiser shard, and its parameters (rank 0 alone where all have all)."""
        rank = torch.distributed.get_rank()
        folder.mkdir(parents=True, exist_ok=True)
        part = {"optimizer": self._own_optimizer().state_dict()}
        if self._sharded:
            part["model"] = self._model.local_state_dict()
        elif rank == 0:
            part["model"] = self.objective.state_dict()
        torch.save(part, folder / f"rank_{rank:05d}.pt")

    def load(self, folder: Path) -> None:
        """Every rank reads its part of what save() wrote with the same number of ranks and the same stage."""
        rank = torch.distributed.get_rank()
        part = torch.load(folder / f"rank_{rank:05d}.pt", map_location="cpu", weights_only=True)
        if self._sharded:
            self._model.load_local_state_dict(part["model"])
        else:
            whole = part if rank == 0 else torch.load(folder / "rank_00000.pt", map_location="cpu", weights_only=True)
            self.objective.load_state_dict(whole["model"])
        self._own_optimizer().load_state_dict(part["optimizer"])

    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """The objective's state in float32 on the host of rank 0 (elsewhere None). All ranks call it."""
        state = self._model.state_dict() if self._sharded else self.objective.state_dict()
        if torch.distributed.get_rank() != 0:
            return None
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def close(self) -> None:
        """Nothing is held but memory."""

    def _own_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer if self._sharded else self._optimizer.optim


def checkpoint_with_offload(block: nn.Module) -> None:
    """Wrap a block in place: its inputs wait in host memory, the rest is computed again in the backward pass."""
    from fairscale.nn import checkpoint_wrapper

    checkpoint_wrapper(block, offload_to_cpu=True)


def _fully_sharded(objective: nn.Module) -> nn.Module:
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
