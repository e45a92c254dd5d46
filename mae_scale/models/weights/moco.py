"""Weights of MoCo v3's authors: whole checkpoints of pre-training, and of their linear probing.

Their names are timm's behind `module.base_encoder.`, with the projector as `head.*`; the momentum encoder and the
predictor lie beside it. Positions are fixed there too, but have the row's half of the channels first, ours the
column's; a classifier takes those of the file, as they are.

L patches, D the width, p the patch's side in pixels.
"""

from __future__ import annotations

from mae_scale.models.moco import Moco
from mae_scale.models.weights.autoencoder import to_timm
from mae_scale.models.weights.files import StateDict

BASE, PARALLEL = "module.base_encoder.", "module."


def encoder_of_moco(state: StateDict) -> StateDict:
    """Return the encoder's tensors, by timm's names, of a checkpoint of the authors'; any other file's as they are.

    Of pre-training those of the base encoder without its projector, as their own linear probing takes them; of linear
    probing and of supervised training all, with the classifier's head.
    """
    if any(key.startswith(BASE) for key in state):
        base = {key.removeprefix(BASE): value for key, value in state.items() if key.startswith(BASE)}
        return {key: value for key, value in base.items() if not key.startswith("head.")}
    if state and all(key.startswith(PARALLEL) for key in state):
        return {key.removeprefix(PARALLEL): value for key, value in state.items()}
    return state


def moco_to_official(model: Moco) -> StateDict:
    """Return encoder, projector and predictor by the authors' names, for their linear probing and transfer.

    BatchNorm's running statistics are not there: their scripts drop the projector. Tensors are copies, on the model's
    device and in its dtype; positions [1, 1 + L, D] and patch projection [D, 3, p, p] as in timm.
    """
    state = {BASE + key: value for key, value in to_timm(model.encoder).items()}
    for ours, theirs in (("projector.", f"{BASE}head."), ("predictor.", f"{PARALLEL}predictor.")):
        own = {key: value for key, value in model.state_dict().items() if key.startswith(ours)}
        state |= {theirs + key.removeprefix(ours): value.detach().clone() for key, value in own.items()}
    return state
