"""BatchNorm over the whole global batch, forward and backward: the same on any number of ranks, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def from_all_ranks(value: Tensor) -> Tensor:
    """Return every rank's value, [ranks, ...], without gradient; of equal shapes. [1, ...] outside a process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value[None]
    gathered = value.new_empty((torch.distributed.get_world_size(), *value.shape))
    torch.distributed.all_gather_into_tensor(gathered.view(-1), value.contiguous().view(-1))
    return gathered


class TrainedGlobalBatchNorm(nn.Module):
    """BatchNorm1d with the statistics of all ranks' batch, which gradients flow through; float32 in any precision.

    Equal to `nn.BatchNorm1d(width, affine=affine)` in training mode on the whole batch. There are no running
    statistics: what is normalised here (MoCo's projections) is not computed outside of training.
    """

    def __init__(self, width: int, *, affine: bool, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Return x [V, B, C] normalised over the B of all ranks, for each of V by itself; float32. Equal B on all."""
        x, _, _ = _Normalised.apply(x.float(), self.eps)
        if self.weight is None or self.bias is None:
            return x
        return x * self.weight.float() + self.bias.float()


class GlobalBatchNorm2d(nn.Module):
    """`nn.BatchNorm2d` with the statistics of all ranks' batch in training; float32 in any precision.

    Every rank has maps of the same number of images and the same size. Running averages are those of the global batch,
    float32 too (in bf16 they would stop following the mean), and take no part in a forward pass that is not finite.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return maps [B, C, h, w] normalised, in the precision that they came in."""
        if self.training:
            batch, channels, height, width = x.shape
            rows = x.float().permute(0, 2, 3, 1).reshape(1, -1, channels)
            normal, mean, var = _Normalised.apply(rows, self.eps)
            count = rows.shape[1] * _ranks()
            self._follow(mean[0], var[0] * (count / max(1, count - 1)))
            normal = normal.reshape(batch, height, width, channels)
        else:
            scale = torch.rsqrt(self.running_var + self.eps)
            normal = (x.float().permute(0, 2, 3, 1) - self.running_mean) * scale
        return (normal * self.weight.float() + self.bias.float()).permute(0, 3, 1, 2).to(x.dtype)

    def _follow(self, mean: Tensor, var: Tensor) -> None:
        """Move the running averages [C] towards a batch's mean and unbiased variance, where these are finite."""
        finite = torch.isfinite(mean.sum() + var.sum())
        for kept, new in ((self.running_mean, mean), (self.running_var, var)):
            kept.copy_(torch.where(finite, kept.lerp(new, self.momentum), kept))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GlobalBatchNorm2d:
        """Move or convert the module; the running averages stay float32."""
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
        return self


def _ranks() -> int:
    found = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if found else 1


def with_global_statistics(module: nn.Module) -> nn.Module:
    """Put GlobalBatchNorm2d in the place of each BatchNorm2d in a module, with its weights; return the module."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                assert child.momentum is not None
                own = GlobalBatchNorm2d(child.num_features, child.eps, child.momentum)
                own.load_state_dict({key: child.state_dict()[key] for key in own.state_dict()})
                setattr(parent, name, own)
    return module


class _Normalised(torch.autograd.Function):
    """x [V, B, C] less its mean, over its standard deviation; one collective forward, one backward.

    Mean and variance [V, C] are returned beside it, without gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        var, mean = torch.var_mean(x, dim=1, correction=0)  # [V, C], of this rank
        means, variances = from_all_ranks(torch.stack([mean, var])).unbind(1)  # [ranks, V, C]
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        scale = torch.rsqrt(var + eps)[:, None]  # [V, 1, C]
        normal = (x - mean[:, None]) * scale
        ctx.save_for_backward(normal, scale)
        ctx.mark_non_differentiable(mean, var)
        return normal, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the sum of all ranks' losses, of which `grad` is this rank's part."""
        normal, scale = ctx.saved_tensors
        means = torch.stack([grad.mean(1), (grad * normal).mean(1)])  # [2, V, C]
        first, second = from_all_ranks(means).mean(0)[:, :, None]  # [V, 1, C] each
        return scale * (grad - first - normal * second), None
