"""`mae-scale` with images that are not a number in the global batches POISON="first:last" (last left out).

OBJECTIVE="module:class" is whose images they are: the masked autoencoder's where it is not given.
"""

import importlib
import os

import torch

from mae_scale.cli.main import main

FIRST, LAST = map(int, os.environ["POISON"].split(":"))
MODULE, NAME = os.environ.get("OBJECTIVE", "mae_scale.tasks.mae.objective:Reconstruct").split(":")
objective = getattr(importlib.import_module(MODULE), NAME)
whole = objective.tensors


def poisoned(self, batch, device):
    images, *rest = whole(self, batch, device)
    return (torch.full_like(images, torch.nan) if FIRST <= batch.number < LAST else images, *rest)


objective.tensors = poisoned
main()
