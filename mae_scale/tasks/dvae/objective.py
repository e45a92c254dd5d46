"""The dVAE's objective: reconstruct images through relaxed words, these kept near the uniform prior."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from data_pipeline.rng import generator
from mae_scale.engines.base import Objective
from mae_scale.models.dvae import DiscreteVae, negative_elb, pictured
from mae_scale.models.tokeniser import STRIDE, from_normalised

if TYPE_CHECKING:
    from data_pipeline.batches import Batch
    from mae_scale.config.task_sections import TokeniserSection

SMALLEST_EXPONENTIAL = 1e-30
"""Of the draws that become Gumbel noise; a generator in float32 may give 0, which has no logarithm."""


@dataclass(frozen=True)
class Annealing:
    """The relaxation's temperature and the weight of the divergence at each step (Ramesh et al., appendix A.2)."""

    temperature: float
    temperature_steps: float
    kl_weight: float
    kl_weight_steps: float

    @classmethod
    def of(cls, section: TokeniserSection, total_steps: int) -> Annealing:
        """Return that of a recipe's section for a schedule of `total_steps`."""
        return cls(
            section.temperature,
            section.temperature_share * total_steps,
            section.kl_weight,
            section.kl_weight_share * total_steps,
        )

    def at(self, step: int) -> tuple[float, float]:
        """Return (temperature, weight) at a step, from 0: half-cycle cosines from 1 and from 0."""
        temperature = _cosine(step, self.temperature_steps, 1.0, self.temperature)
        return temperature, _cosine(step, self.kl_weight_steps, 0.0, self.kl_weight)


def _cosine(step: int, steps: float, first: float, last: float) -> float:
    if step >= steps:
        return last
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * step / steps))


class ReconstructThroughWords(Objective):
    """The negative evidence lower bound per pixel value (Ramesh et al., section 2.1), mean over the images."""

    def __init__(self, model: DiscreteVae, annealing: Annealing, *, image_size: int, seed: int):
        super().__init__()
        self.model, self.annealing, self.seed = model, annealing, seed
        self.grid = image_size // STRIDE
        self.never_decayed: set[str] = set()

    @property
    def blocks(self) -> list[nn.Module]:
        """Residual blocks, encoder then decoder: what is compiled, checkpointed and sharded."""
        return [*self.model.blocks]

    def draw(self, step: int, positions: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Return seeds of the noise int64 [B], temperatures and weights of the divergence float32 [B], on the host.

        A seed is a pure function of (seed, step, position in the global batch), the others of the step. The noise
        itself, 1.6 million numbers per image of 112 px with 8192 words, is drawn by tensors(): here it would cost some
        three times as much as decoding the image, and as many bytes to copy as 40 of them.
        """
        seeds = [int(generator(self.seed, "gumbel", step, int(p)).integers(2**63)) for p in positions]
        annealed = torch.tensor([self.annealing.at(step)] * len(positions), dtype=torch.float32)
        return torch.tensor(seeds, dtype=torch.int64), *annealed.reshape(-1, 2).unbind(dim=1)

    def tensors(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Return images [B, 3, S, S], noise [B, V, G, G], temperatures [B] and weights [B], float32 on the device.

        The device draws the noise of each image from the image's own seed, so that it is the same for any ranks and
        micro-batches; that of a CPU and of a GPU, or of two models of GPUs, differ.
        """
        seeds, temperature, kl_weight = batch.drawn
        words = self.model.encoder.size.words
        noise = gumbel_noise(seeds, (words, self.grid, self.grid), device)
        images, temperature, kl_weight = (
            tensor.to(device, non_blocking=True) for tensor in (batch.images, temperature, kl_weight)
        )
        return images, noise, temperature, kl_weight

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor | None = None,
        temperature: torch.Tensor | None = None,
        kl_weight: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """images [B, 3, S, S] normalised, noise [B, V, G, G], temperature [B], kl_weight [B] -> the loss, [] float32.

        Without noise, through the most probable words: each image's loss [B] at the schedule's last weight of the
        divergence, the words int64 [B, L], and the pictures [B, 3, S, S] from 0 to 1.
        """
        pixels = from_normalised(images.float())
        if noise is None or temperature is None or kl_weight is None:
            statistics, logits = self.model.most_probable(pixels)
            losses = negative_elb(statistics, logits, pixels, self.annealing.kl_weight)
            return losses, logits.argmax(dim=1).flatten(1), pictured(statistics)
        statistics, logits = self.model(pixels, noise, temperature)
        return negative_elb(statistics, logits, pixels, kl_weight).mean()


def gumbel_noise(seeds: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return standard Gumbel noise [B, *shape] float32 on the device, of each of the seeds int64 [B] on the host."""
    noise = torch.empty(len(seeds), *shape, device=device)
    draws = torch.Generator(device)
    for own, seed in zip(noise, seeds.tolist(), strict=True):
        own.exponential_(generator=draws.manual_seed(seed))
    return noise.clamp_(min=SMALLEST_EXPONENTIAL).log_().neg_()
