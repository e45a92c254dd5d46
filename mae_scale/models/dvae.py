"""The discrete variational autoencoder (Ramesh et al., arXiv 2102.12092, section 2.1 and appendix A).

The encoder gives each 8 x 8 pixels a distribution over words (models.tokeniser). A word is drawn from it by the
Gumbel-softmax relaxation (Jang et al., arXiv 1611.01144), and the decoder gives the pixels' likelihood from the words.

Letters in shapes: B images, S their side in pixels, V words, G = S / 8, the words of an image in a row.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from mae_scale.models.tokeniser import (
    GROUPS,
    LOGIT_LAPLACE_EPS,
    STRIDE,
    Block,
    Group,
    Tokeniser,
    TokeniserSize,
    into_open_interval,
)

VALUES_PER_WORD = 3 * STRIDE**2
"""Values of the pixels for which a word stands: 192."""


class WordDecoder(nn.Module):
    """Decoder of words to the likelihood of pixels: the published one's layers, by its names."""

    def __init__(self, size: TokeniserSize):
        super().__init__()
        width, layers = size.width, GROUPS * size.blocks_per_group
        widths = [width // 2, 8 * width, 4 * width, 2 * width, width]
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["input"] = nn.Conv2d(size.words, widths[0], kernel_size=1)
        for number, (before, after) in enumerate(pairwise(widths), start=1):
            upsample = {"upsample": nn.Upsample(scale_factor=2, mode="nearest")} if number < GROUPS else {}
            parts[f"group_{number}"] = Group(before, after, size.blocks_per_group, layers, (1, 3, 3, 3), **upsample)
        parts["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=nn.Conv2d(width, 6, kernel_size=1)))
        self.blocks = nn.Sequential(parts)

    def forward(self, words: Tensor) -> Tensor:
        """Return [B, 6, S, S], in the parameters' dtype, of words' weights [B, V, G, G].

        Of each of the three channels the logit-Laplace distribution's location, then of each the logarithm of its
        scale.
        """
        return self.blocks(words.to(next(self.parameters()).dtype))


class DiscreteVae(nn.Module):
    """Encoder and decoder, initialised as published: normal weights of variance 1 / fan-in, biases 0."""

    def __init__(self, size: TokeniserSize):
        super().__init__()
        self.encoder, self.decoder = Tokeniser(size), WordDecoder(size)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> list[nn.Module]:
        """Residual blocks, encoder then decoder."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def forward(self, pixels: Tensor, noise: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Return (statistics [B, 6, S, S], logits [B, V, G, G]), both float32, through relaxed words.

        pixels [B, 3, S, S] from 0 to 1; noise [B, V, G, G] float32, of the standard Gumbel distribution; temperature
        [B] float32. The words' weights are softmax((logits + noise) / temperature), in float32.
        """
        logits = self.encoder(pixels).float()
        words = functional.softmax((logits + noise) / temperature[:, None, None, None], dim=1)
        return self.decoder(words).float(), logits

    def most_probable(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return as forward() does, through the most probable words."""
        logits = self.encoder(pixels).float()
        words = functional.one_hot(logits.argmax(dim=1), logits.shape[1]).permute(0, 3, 1, 2)
        return self.decoder(words).float(), logits


def log_likelihood(statistics: Tensor, pixels: Tensor) -> Tensor:
    """Return the logarithm of the logit-Laplace density [B, 3, S, S] of pixels [B, 3, S, S] from 0 to 1.

    With x the pixel mapped into eps to 1 - eps, location m and scale b: exp(-|logit(x) - m| / b) / (2 b x (1 - x))
    (Ramesh et al., appendix A.3). statistics [B, 6, S, S]: three channels of m, three of ln b.
    """
    location, log_scale = statistics.chunk(2, dim=1)
    x = into_open_interval(pixels)
    distance = (torch.logit(x) - location).abs()
    return -distance * torch.exp(-log_scale) - log_scale - math.log(2) - torch.log(x * (1 - x))


def divergence(logits: Tensor) -> Tensor:
    """Return the divergence [B, G, G], in nats, of the words' distributions (logits [B, V, G, G]) from the uniform."""
    log_probabilities = functional.log_softmax(logits, dim=1)
    return (log_probabilities.exp() * log_probabilities).sum(dim=1) + math.log(logits.shape[1])


def negative_elb(statistics: Tensor, logits: Tensor, pixels: Tensor, kl_weight: Tensor | float) -> Tensor:
    """Return each image's negative evidence lower bound per pixel value [B], in nats, its divergence weighted.

    As published the sum over an image is divided by its 3 S^2 values, by which a word's divergence is weighted by
    kl_weight / 192. kl_weight: [B], or the same for all.
    """
    reconstruction = -log_likelihood(statistics, pixels).mean(dim=(1, 2, 3))
    return reconstruction + kl_weight / VALUES_PER_WORD * divergence(logits).mean(dim=(1, 2))


def pictured(statistics: Tensor) -> Tensor:
    """Return the medians of the pixels' distributions [B, 3, S, S], from 0 to 1."""
    x = torch.sigmoid(statistics[:, :3])
    return ((x - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)).clamp(0, 1)
