"""From a trained engine's weights to one file that others read."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.weights import to_official


def export_weights(model: MaskedAutoencoder, path: Path) -> None:
    """Write a plain model's weights in the layout of the authors' release, float32 safetensors.

    With the decoder, unless it has no mask token (an encoder that takes the mask tokens itself).
    The file appears under its name only when it is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    official = to_official(model, decoder=not model.encoder_mask_tokens)
    state = {name: tensor.detach().float().contiguous() for name, tensor in official.items()}
    save_file(state, beside, metadata={"format": "pt", "layout": "official"})
    with open(beside, "rb") as file:
        os.fsync(file.fileno())
    beside.rename(path)


def plain_model(model: MaskedAutoencoder, state: dict[str, torch.Tensor]) -> MaskedAutoencoder:
    """Fill a freshly built model from an engine's full state of the objective around it (keys `model....`)."""
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    return model.eval()
