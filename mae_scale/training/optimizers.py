"""Parameter groups and the optimiser over them."""

from __future__ import annotations

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
