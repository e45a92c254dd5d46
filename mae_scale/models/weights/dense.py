"""Weights of a detector or a segmenter: an encoder's from a file in any known layout, or all of it from our own.

A pre-trained or fine-tuned ViT gives its patches, positions and blocks; relative positions begin at zero. A BEiT gives
each block its biases by relative position, resampled to the block's window or to the image. What comes after the
encoder stays fresh. A cls token, with its biases, a final norm, a head and a decoder have no place here.
"""

from __future__ import annotations

from data_pipeline.errors import UsageError
from mae_scale.models.beit import CLS_ROWS, TABLE
from mae_scale.models.dense import BiasedAttention, DenseModel
from mae_scale.models.detector import MaskRcnn
from mae_scale.models.weights.beit import own_tables
from mae_scale.models.weights.checked_copy import LoadReport, check_same, check_size, copy_weights
from mae_scale.models.weights.classifier import check_encoder, on_grid, release_names
from mae_scale.models.weights.files import StateDict
from mae_scale.models.weights.layouts import DECODER, ENCODER, UNNAMED, dense_kind, from_release, to_release
from mae_scale.models.weights.vitdet import is_vitdet, load_vitdet

_UNUSED = ("cls_token", "norm.", "fc_norm.", "head.", "batch_norm.", "lm_head.", *DECODER, *UNNAMED)
_RELATIVE = ("attn.rel_pos_h", "attn.rel_pos_w")


def load_dense(model: DenseModel, state: StateDict, grid: tuple[int, int] | None = None) -> LoadReport:
    """Copy a file's tensors (`read_weights`) into the model's encoder, or into all of it where they are of the whole.

    Layouts of an encoder are those of `load_classifier`; of a detector also ViTDet's. Positions of another grid than
    the encoder's own, that of its pretraining_size, are resampled in float32, bicubic and without antialiasing, a
    BEiT's tables of biases as `own_tables` does; theirs is `grid` (rows, columns), where it is known, else a square's.
    Raises UsageError, with nothing copied: a file of another size or kind, keys that are missing or unexpected, shapes
    that do not fit.
    """
    own, encoder = model.state_dict(keep_vars=True), model.encoder
    kind, own_kind = kind_of(state), dense_kind(own)
    if kind is not None and kind != own_kind:
        raise UsageError(
            f"these are weights of {kind}, and the recipe's task trains {own_kind}: give those of one, or an encoder's"
        )
    if is_vitdet(state):
        assert isinstance(model, MaskRcnn)
        return load_vitdet(model, state)
    if kind is not None:
        advice = "give weights of the same model, image size and classes, or those of a pre-training"
        check_same(state, own, layout="our own detector or segmenter", advice=advice)
        return copy_weights(own, state)
    given, layout = release_names(state)
    check_encoder(given, takes_beit=encoder.pos_embed is None)
    check_size(given, encoder.size)
    if encoder.pos_embed is not None and "pos_embed" not in given:
        raise UsageError(
            "the weights have no positions, so the image size that they were trained at is not known; write them again "
            "with `mae-scale export --format official`"
        )
    unused = [key for key in given if key.startswith(_UNUSED)]
    given = {key: value for key, value in given.items() if not key.startswith(_UNUSED)}
    if encoder.pos_embed is None:
        grids = [block.attn.grid for block in encoder.blocks if isinstance(block.attn, BiasedAttention)]
        given = own_tables(given, grids=grids, given_grid=grid)
        given = {key: value[:-CLS_ROWS] if key.endswith(TABLE) else value for key, value in given.items()}
    else:
        own_grid = (encoder.pretraining_grid, encoder.pretraining_grid)
        given["pos_embed"] = on_grid(given["pos_embed"], own_grid, grid)[:, 1:]
    prefix = "encoder."
    expected = to_release({name: value for name, value in own.items() if name.startswith(prefix)}, ENCODER)
    expected = {name: value for name, value in expected.items() if not name.endswith(_RELATIVE)}
    check_same(given, expected, layout=layout, advice="give a whole file of a plain ViT, with nothing else in it")
    report = copy_weights(own, from_release(given, ENCODER))
    report.unused = unused
    return report


def kind_of(state: StateDict) -> str | None:
    """Return what weights in any layout are of: "a detector", "a segmenter", or None for an encoder."""
    return "a detector" if is_vitdet(state) else dense_kind(state)


def refuse_others(state: StateDict, kind: str, source: str) -> None:
    """Raise UsageError when weights, of a place that is named, are not of the kind that is to be evaluated."""
    found = kind_of(state)
    if found != kind:
        raise UsageError(
            f"--weights {source} holds {found or 'an encoder'}, expected {kind}; train one first, and give that run"
        )
