"""The targets that the decoder predicts for each removed patch. One small class per target.

A target is an nn.Module, so that its buffers move with the model and travel in its checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.errors import UsageError
from mae_scale.models.vit import gather_tokens

if TYPE_CHECKING:
    from typing_extensions import Self

WORDS = "tokens"
"""The recipe's name of the target that is a tokeniser's word."""


class Target(nn.Module):
    """Interface of a target: `dim` values per patch of P = p*p*3 pixel values (row, column, channel), and their loss.

    All in fp32, whatever the model's dtype. One that is a class and not a vector overrides `loss`.
    """

    dim: int

    def forward(self, patches: Tensor) -> Tensor:
        """Return the targets [..., dim], fp32, of patches [..., P]."""
        raise NotImplementedError

    def of_removed(self, patches: Tensor, removed: Tensor) -> Tensor:
        """Return the targets [B, R, dim] of the removed int64 [B, R] of all patches [B, L, P]."""
        return self(gather_tokens(patches, removed))

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the loss per patch [...], fp32, of prediction and target [..., dim]: the mean squared error."""
        return (prediction.float() - target).square().mean(dim=-1)

    def to_pixels(self, prediction: Tensor, patches: Tensor) -> Tensor:
        """Return a prediction [..., dim] as pixels [..., P] for figures; patches [..., P] are the true ones."""
        raise NotImplementedError


class Pixels(Target):
    """The patch's pixel values."""

    def __init__(self, patch_size: int):
        super().__init__()
        self.dim = patch_size**2 * 3

    def forward(self, patches: Tensor) -> Tensor:
        return patches.float()

    def to_pixels(self, prediction: Tensor, patches: Tensor) -> Tensor:
        return prediction.float()


class NormalisedPixels(Pixels):
    """The patch's pixel values minus their mean, divided by sqrt(unbiased variance + 1e-6)."""

    def forward(self, patches: Tensor) -> Tensor:
        patches = patches.float()
        mean, std = self._mean_and_std(patches)
        return (patches - mean) / std

    def to_pixels(self, prediction: Tensor, patches: Tensor) -> Tensor:
        mean, std = self._mean_and_std(patches.float())
        return prediction.float() * std + mean

    @staticmethod
    def _mean_and_std(patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation [..., 1] of patches fp32 [..., P]."""
        mean = patches.mean(dim=-1, keepdim=True)
        # On a CPU torch.var takes four times as long.
        variance = (patches - mean).square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
        return mean, (variance + 1e-6).sqrt()


class PcaCoefficients(Target):
    """Coefficients of the patch in the `components` largest principal directions (96 in the paper).

    Fitted on patches of the training set by `fit`, or restored with the model's weights; before that its use raises
    UsageError. Its buffers stay fp32 when the model is cast.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, patch_size: int, components: int = 96):
        super().__init__()
        pixels = patch_size**2 * 3
        self.dim = min(components, pixels)
        self.fitted = False
        self.register_buffer("mean", torch.zeros(pixels))  # [P]
        self.register_buffer("components", torch.zeros(self.dim, pixels))  # [dim, P]

    def fit(self, patches: np.ndarray | Tensor) -> PcaCoefficients:
        """Fit mean and components to patches [n, P]; see `fit_pca`. Returns itself."""
        mean, components = fit_pca(patches, self.dim)
        if tuple(components.shape) != tuple(self.components.shape):
            raise UsageError(
                f"patches have {components.shape[1]} values, this target's have {self.components.shape[1]}"
            )
        self.mean.copy_(mean)
        self.components.copy_(components)
        self.fitted = True
        return self

    def forward(self, patches: Tensor) -> Tensor:
        self._check_fitted()
        return (patches.float() - self.mean) @ self.components.T

    def to_pixels(self, prediction: Tensor, patches: Tensor) -> Tensor:
        self._check_fitted()
        return prediction.float() @ self.components + self.mean

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise UsageError(
                "the PCA target has no components yet: call model.target.fit(patches), patches [n, p*p*3] "
                "of the training set, or load weights that were trained with this target"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        loaded = state_dict.get(prefix + "components")
        if loaded is not None and not loaded.is_meta:
            self.fitted = bool(loaded.any())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model to another device, but keep the buffers' fp32 values when the model is cast."""
        before = {"mean": self.mean, "components": self.components}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old if old.is_meta else old.to(new.device))
        return self


class Words(Target):
    """The word that a tokeniser has for the patch, one of `dim`; the loss is the cross-entropy."""

    def __init__(self, words: int):
        super().__init__()
        self.dim = words

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy [...] fp32 of logits [..., V] and words int64 [...]."""
        flat = functional.cross_entropy(prediction.float().flatten(0, -2), target.flatten(), reduction="none")
        return flat.view(target.shape)

    def to_pixels(self, prediction: Tensor, patches: Tensor) -> Tensor:
        raise UsageError("a model that predicts words has no pixels to draw; give one with another model.target")


def fit_pca(patches: np.ndarray | Tensor, k: int = 96) -> tuple[Tensor, Tensor]:
    """Return the PCA of patches [n, P]: mean [P] and the k largest components [k, P], orthonormal, fp32.

    From the eigenvectors of the covariance in float64; each row's largest entry by magnitude is positive, so
    the result has no free sign. Raises UsageError for fewer than k patches or fewer than k values per patch.
    """
    x = torch.as_tensor(patches).detach().to("cpu", torch.float64)  # [n, P]
    if x.ndim != 2 or min(x.shape) < k:
        raise UsageError(f"patches of shape {tuple(x.shape)} cannot give {k} components: expected [n, P], both >= {k}")
    mean = x.mean(dim=0)  # [P]
    covariance = (x - mean).T @ (x - mean)  # [P, P]
    components = torch.linalg.eigh(covariance).eigenvectors.T.flip(0)[:k]  # [k, P], largest first
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))  # [k, 1]
    return mean.float(), (components * largest.sign()).float()


def make_target(target: str | Target, patch_size: int, *, words: int = 8192) -> Target:
    """Return the target named "pixels", "normalised_pixels", "pca" or "tokens", or `target` itself.

    For a patch_size in px; words: the number of words of the tokeniser, for "tokens".
    """
    if isinstance(target, Target):
        return target
    if target == WORDS:
        return Words(words)
    kinds = {"pixels": Pixels, "normalised_pixels": NormalisedPixels, "pca": PcaCoefficients}
    if target not in kinds:
        raise UsageError(f"unknown target {target!r}: expected one of {', '.join([*kinds, WORDS])}, or a Target")
    return kinds[target](patch_size)
