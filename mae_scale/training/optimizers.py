"""Parameter groups and the optimiser over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from mae_scale.recipe import OptimSection


def parameter_groups(module: nn.Module, weight_decay: float, never_decayed: set[str]) -> list[dict]:
    """Two groups: decayed, and not (biases, norms: at most one dimension; and the tokens named in never_decayed).

    A name in never_decayed is the last part of a parameter's name, such as `cls_token`.
    """
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim <= 1 or name.rpartition(".")[2] in never_decayed
            (plain if exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "lr_scale": 1.0, "name": "decayed"},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0, "name": "not decayed"},
    ]


def adamw_options(optim: OptimSection) -> dict:
    """Keyword arguments of torch.optim.AdamW; fused on CPU and GPU alike. The loop sets lr at every step."""
    return {"lr": 0.0, "betas": tuple(optim.betas), "eps": 1e-8, "fused": True}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group lr x its own lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


MOMENTS = ("exp_avg", "exp_avg_sq")


def fresh_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter before its first step, as torch makes it for the fused kind."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        **{key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS},
    }


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> Callable[[], bool]:
    """Let the next step change nothing if the gradient's norm [] is not finite; returns whether it was so.

    Decided on the device, by fused AdamW itself: the host does not wait.
    """
    found = torch.isfinite(norm).logical_not()
    optimizer.found_inf = found.float()
    return found.item
