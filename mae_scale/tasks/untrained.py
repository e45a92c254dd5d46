"""The loss of a model that does not look at its images, where words or pixels are predicted."""

import math

import torch

from mae_scale.models.targets import Target, Words
from mae_scale.models.vit import patchify
from mae_scale.training.context import RunContext
from mae_scale.training.preflight import training_augmentation
from mae_scale.training.self_check import Untrained
from mae_scale.training.shown_images import some_images

IMAGES = 64


def loss_of_guessing(target: Target, context: RunContext, patch_size: int) -> Untrained:
    """Return ln(words), or the variance of the target's values over some training images: that of their mean."""
    if isinstance(target, Words):
        return Untrained(math.log(target.dim), f"ln({target.dim})", tolerance=0)
    images = some_images(context.index, IMAGES, context.recipe, training_augmentation(context.recipe))
    patches = patchify(images.to(context.device), patch_size).flatten(0, 1)
    with torch.inference_mode():
        values = target(patches)
    loss = float((values - values.mean(dim=0)).square().mean())
    return Untrained(loss, "the variance of what is predicted", tolerance=0.02)
