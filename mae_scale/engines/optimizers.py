"""Parameter groups, the optimiser over them, and what it keeps for each parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from timm.optim import Lars as TimmLars
from torch import nn

from mae_scale.checkpoints.shards import EMA
from mae_scale.engines.host_copy import HostCopy

if TYPE_CHECKING:
    from mae_scale.config.schema import OptimSection


def parameter_groups(objective: nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """Two groups a layer: decayed, and not (biases, norms: at most one dimension; and the objective's never_decayed).

    A name in never_decayed is the last part of a parameter's name, such as `cls_token`. lr_scale is
    layer_decay ^ (layers after it), as in BEiT (arXiv 2106.08254) and the authors' release; without layer_decay the
    objective is one layer. Parameters that take no gradient are left out.
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


def optimizer_class(optim: OptimSection) -> type[torch.optim.Optimizer]:
    """torch's AdamW, or LARS."""
    return torch.optim.AdamW if optim.name == "adamw" else Lars


def optimizer_options(optim: OptimSection) -> dict[str, Any]:
    """Keyword arguments of optimizer_class; AdamW fused on CPU and GPU alike. The loop sets lr at every step."""
    if optim.name == "adamw":
        return {"lr": 0.0, "betas": tuple(optim.betas), "eps": 1e-8, "fused": True}
    return {"lr": 0.0, "momentum": optim.momentum}


class Lars(TimmLars):
    """timm's LARS (You et al., arXiv 1708.03888), which leaves out a step whose gradients are not finite.

    A group with `always_adapt` has the trust ratio without weight decay too: in linear probing the weights, not the
    biases, as in the authors' release.
    """

    found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None):
        if self.found_inf is not None and self.found_inf.item():
            return None
        return super().step(closure)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group lr x its own lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def fresh_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, *, ema: bool) -> dict[str, torch.Tensor]:
    """Return a parameter's optimiser state before the first step, as it makes it; with ema the average too."""
    adam = isinstance(optimizer, torch.optim.AdamW)
    keys = ("exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",)
    state = {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in keys}
    if adam:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    if ema:
        state[EMA] = parameter.detach().clone()
    return state


def moments(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what of a parameter's state has the parameter's own shape, by name."""
    return {key: value for key, value in state.items() if key != "step"}


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> Callable[[], float]:
    """Let the next step change nothing if the gradient's norm [] is not finite; returns what reads whether it was so.

    Decided on the device, by fused AdamW itself: the host does not wait.
    """
    optimizer.found_inf = torch.isfinite(norm).logical_not().float()
    return HostCopy(optimizer.found_inf)


def clip_gradients(gradients: list[torch.Tensor], norm: torch.Tensor, limit: float | None) -> None:
    """Scale gradients of L2 norm `norm` [] in place, so that it is at most `limit`; the host does not wait.

    The rule of torch.nn.utils.clip_grad_norm_.
    """
    if limit:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
