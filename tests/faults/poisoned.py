"""`mae-scale` with images that are not a number in the global batches POISON="first:last" (last left out)."""

import os

import torch

from mae_scale.cli.main import main
from mae_scale.tasks.mae.objective import Reconstruct

FIRST, LAST = map(int, os.environ["POISON"].split(":"))
whole = Reconstruct.tensors


def poisoned(self, batch, device):
    images, *rest = whole(self, batch, device)
    return (torch.full_like(images, torch.nan) if FIRST <= batch.number < LAST else images, *rest)


Reconstruct.tensors = poisoned
main()
