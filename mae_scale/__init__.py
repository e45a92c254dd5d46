"""mae-scale: masked-autoencoder pre-training of Vision Transformers, from one laptop to a Slurm cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mae_scale.checkpoints.encoder import PretrainedEncoder
    from mae_scale.models.tokeniser import Tokeniser

__version__ = "0.1.0"


def load_encoder(path: str | Path, *, heads: int | None = None) -> PretrainedEncoder:
    """Return the pre-trained encoder of a run's folder, a checkpoint, or a file of weights in any known layout.

    Examples:
        >>> encoder = mae_scale.load_encoder(weights)  # such as runs/vit_base, or mae_pretrain_vit_base.pth
        >>> image = encoder.transform(photo)  # of PIL.Image.open
        >>> encoder.forward_features(image[None]).shape
        torch.Size([1, 197, 768])

    See mae_scale.checkpoints.encoder.
    """
    from mae_scale.checkpoints import encoder

    return encoder.load_encoder(path, heads=heads)


def load_tokeniser(path: str | Path) -> Tokeniser:
    """Return a tokeniser, frozen: of transformers' FlavaImageCodebook, DALL-E's encoder.pkl, or a run of task dvae.

    Its tokens() takes images [B, 3, 112, 112] from 0 to 1 and gives [B, 196]. A module that was pickled whole is read
    without running what else is in the file; see mae_scale.models.weights.whole_module.
    """
    from pathlib import Path

    from mae_scale.checkpoints.tokeniser import open_tokeniser

    return open_tokeniser(Path(path))
