"""Parameter groups, the optimiser over them, and its state of each parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from timm.optim.lars import Lars as TimmLars

from mae_scale.checkpoints.shards import EMA, MOMENTUM
from mae_scale.engines.base import Objective

if TYPE_CHECKING:
    from mae_scale.config.sections import OptimSection


def parameter_groups(objective: Objective, optim: OptimSection) -> list[dict[str, Any]]:
    """Return two groups per layer: with weight decay, and without (biases, norms, the objective's never_decayed).

    lr_scale is layer_decay ^ (layers after it), as in BEiT (arXiv 2106.08254) and the authors' release; without
    layer_decay the objective is one layer. Parameters that require no gradient are left out.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        exempt = parameter.ndim <= 1 or name.rpartition(".")[2] in objective.never_decayed
        layer = 0 if optim.layer_decay == 1 else objective.layer_of(name)
        last = 0 if optim.layer_decay == 1 else objective.layers - 1
        if (layer, exempt) not in groups:
            groups[layer, exempt] = {
                "params": [],
                "weight_decay": 0.0 if exempt else optim.weight_decay,
                "lr_scale": optim.layer_decay ** (last - layer),
                "name": f"layer {layer}, not decayed" if exempt else f"layer {layer}, decayed",
                **({"always_adapt": not exempt} if optim.name == "lars" else {}),
            }
        groups[layer, exempt]["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def group_lines(groups: list[dict[str, Any]]) -> list[str]:
    """Return a human-readable line for each group: its share of the learning rate, weight decay, and size."""
    return [
        f"  {group['name']:24}  lr x {group['lr_scale']:.4f}  weight decay {group['weight_decay']:<5g}"
        f"{sum(p.numel() for p in group['params']):>12,} parameters"
        for group in groups
    ]


def optimizer_class(optim: OptimSection) -> type[torch.optim.Optimizer]:
    """Return torch's AdamW, or LARS."""
    return torch.optim.AdamW if optim.name == "adamw" else Lars


def optimizer_options(optim: OptimSection) -> dict[str, Any]:
    """Return the keyword arguments of optimizer_class; AdamW is fused. The loop sets lr at every step."""
    if optim.name == "adamw":
        return {"lr": 0.0, "betas": tuple(optim.betas), "eps": 1e-8, "fused": True}
    return {"lr": 0.0, "momentum": optim.momentum}


class Lars(TimmLars):
    """timm's LARS (You et al., arXiv 1708.03888), which skips a step whose gradients are not finite.

    A group with `always_adapt` has the trust ratio even without weight decay: in linear probing the weights, not the
    biases, as in the authors' release.
    """

    found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters unless found_inf is 1."""
        if self.found_inf is not None and self.found_inf.item():
            return None
        return super().step(closure)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to lr x its lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def fresh_state(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, *, ema: bool, momentum: bool = False
) -> dict[str, torch.Tensor]:
    """Return the state that the optimiser gives a parameter before the first step; with ema its average too.

    momentum: also the average of a momentum encoder.
    """
    adam = isinstance(optimizer, torch.optim.AdamW)
    keys = ("exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",)
    state = {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in keys}
    if adam:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    if ema:
        state[EMA] = parameter.detach().clone()
    if momentum:
        state[MOMENTUM] = parameter.detach().clone()
    return state


def moments(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a parameter's state that have the parameter's shape, by name."""
    return {key: value for key, value in state.items() if key != "step"}


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> torch.Tensor:
    """Make the optimiser's next step change nothing if the gradient's norm [] is not finite; return 1.0 then, else 0.0.

    The answer [] is on the device, where fused AdamW and Lars read it themselves: the host does not wait.
    """
    found = torch.isfinite(norm).logical_not().float()
    optimizer.found_inf = found  # type: ignore[attr-defined]  # torch's way of telling an optimiser
    return found


def clip_gradients(gradients: list[torch.Tensor], norm: torch.Tensor, limit: float | None) -> None:
    """Scale gradients of L2 norm `norm` [] in place, so that it is at most `limit`; the host does not wait.

    The rule of torch.nn.utils.clip_grad_norm_.
    """
    if limit:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
