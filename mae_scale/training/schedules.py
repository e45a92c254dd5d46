"""The learning rate of every step."""

import math


def learning_rate(step: int, *, peak_lr: float, steps_per_epoch: int, epochs: int, warmup_epochs: int) -> float:
    """The rate for update number `step` (from 0): linear warm-up, then half-cycle cosine to 0 (He et al., table 8).

    With e = step / steps_per_epoch: peak * e / warmup_epochs while e < warmup_epochs, then
    peak * (1 + cos(pi * (e - warmup_epochs) / (epochs - warmup_epochs))) / 2.
    """
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return peak_lr * epoch / warmup_epochs
    return peak_lr * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))
