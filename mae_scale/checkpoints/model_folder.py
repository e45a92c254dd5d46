"""A folder that transformers or timm opens by itself: weights, architecture, and preparation of an image.

    model.safetensors         the weights, by the library's names
    config.json               the architecture and the names of the classes; for timm also the preparation
    preprocessor_config.json  for transformers: the preparation, that of our evaluation; not for images that are not
                              square, which none of its processors cuts like that

Neither library is imported: their formats are documented, and tests open the folders with both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from safetensors.torch import save
from torch import Tensor

from data_pipeline.augment.crop import EVALUATION_CROP
from data_pipeline.errors import UsageError
from data_pipeline.files import write_atomically, write_json
from data_pipeline.image_size import height_and_width, size_text
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from mae_scale.checkpoints.export import Model, grid_note, weights_in
from mae_scale.models.beit import Beit, BeitEncoder
from mae_scale.models.classifier import Classifier
from mae_scale.models.dense import DenseModel
from mae_scale.models.mae import MaskedAutoencoder
from mae_scale.models.moco import Moco
from mae_scale.models.targets import NormalisedPixels, Pixels
from mae_scale.models.vit import SIZES
from mae_scale.models.weights.autoencoder import to_hf
from mae_scale.models.weights.classifier import classifier_to_hf, classifier_to_timm

EncoderModel = MaskedAutoencoder | Beit | Moco | Classifier
"""A model that the libraries have an architecture for, or for its encoder."""
WEIGHTS, CONFIG, PREPROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
LAYER_NORM_EPS = 1e-6
BICUBIC = 3  # Pillow's number


def export_folder(model: Model, classes: Sequence[str] | None, folder: Path, layout: str) -> str:
    """Write a model's folder for "hf" or "timm"; return its human-readable kind.

    `classes`: the names of a classifier's classes. Weights are float32; each file appears under its name only when it
    is whole, config.json last. Raises UsageError for a model that the library has no architecture for, for a folder
    that holds other weights or is a run's own, and when the folder cannot be written.
    """
    if isinstance(model, DenseModel):
        raise UsageError(
            f"--format {layout} has no folder for a detector or a segmenter; write a file with --format safetensors"
        )
    if layout == "hf":
        what, config, state = _for_transformers(model, classes)
        preprocessor = _preprocessor(model.image_size) if isinstance(model.image_size, int) else None
        if preprocessor is None:
            what += f", without {PREPROCESSOR}: none of transformers' cuts rectangles as evaluation does"
    else:
        what, config, state = _for_timm(model, classes)
        preprocessor = None
    if folder.name == "export" and (folder.absolute().parent / "recipe.yaml").exists():
        raise UsageError(f"{folder} is for the weights that the run itself leaves; choose another folder")
    if (folder / WEIGHTS).exists() and not (folder / CONFIG).exists():
        raise UsageError(f"{folder} holds other weights ({WEIGHTS} without {CONFIG}); choose another folder")
    weights = {name: tensor.detach().float().contiguous() for name, tensor in state.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / WEIGHTS, save(weights, metadata={"format": "pt", **grid_note(model)}))
        if preprocessor is None:
            (folder / PREPROCESSOR).unlink(missing_ok=True)
        else:
            write_json(folder / PREPROCESSOR, preprocessor)
        write_json(folder / CONFIG, config)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}; expected a folder") from None
    return what


def _for_transformers(
    model: EncoderModel, classes: Sequence[str] | None
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return the kind, config.json and weights for transformers' from_pretrained."""
    size = model.encoder.size
    config = {
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
        "hidden_act": "gelu",
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": model.image_size,
        "patch_size": size.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
    }
    if isinstance(model.encoder, BeitEncoder):
        _refuse_rectangles(model, "BEiT")  # it reads tables with rows and columns exchanged
        return _beit_for_transformers(model, config, classes)
    if not isinstance(model, Classifier):
        _refuse_rectangles(model, "ViTMAE")  # it refuses such images
    if isinstance(model, Classifier):
        state = classifier_to_hf(model)
        architecture, kind, more = "ViTForImageClassification", "vit", _labels(classes, model.classes)
    elif _has_their_decoder(model):
        state = to_hf(model)
        architecture, kind, more = "ViTMAEForPreTraining", "vit_mae", _decoder(model)
    else:
        state = to_hf(model.encoder)
        architecture, kind, more = "ViTMAEModel", "vit_mae", {"mask_ratio": 0.0}
    what = f"transformers' {architecture}"
    if architecture == "ViTMAEModel":
        what += ", the encoder over all patches (transformers has no decoder of that kind)"
    return what, {"architectures": [architecture], "model_type": kind, **config, **more}, state


def _refuse_rectangles(model: EncoderModel, theirs: str) -> None:
    """Raise UsageError for a model of images that are not square, for transformers' architecture `theirs`."""
    if not isinstance(model.image_size, int):
        raise UsageError(
            f"the model is for images of {size_text(model.image_size)} px, and transformers' {theirs} takes square "
            "ones only: use --format timm, or --format hf with a name that ends in .safetensors, for the weights alone"
        )


def _beit_for_transformers(
    model: EncoderModel, config: dict[str, Any], classes: Sequence[str] | None
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return the kind, config.json and weights; config: the sizes. Its head predicts words, or pixels."""
    config = {key: value for key, value in config.items() if key != "qkv_bias"} | {
        "use_absolute_position_embeddings": False,
        "layer_scale_init_value": 1.0,  # not 0, or transformers has no scales; their values are in the file
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
    }
    if isinstance(model, Classifier):
        architecture = "BeitForImageClassification"
        more = {
            "use_relative_position_bias": True,
            "use_mean_pooling": model.pool == "mean",
            **_labels(classes, model.classes),
        }
    else:
        assert isinstance(model, Beit)
        architecture = "BeitForMaskedImageModeling"
        more = {"use_shared_relative_position_bias": True, "use_mask_token": True, "vocab_size": model.target.dim}
    what = {"architectures": [architecture], "model_type": "beit", **config, **more}
    return f"transformers' {architecture}", what, weights_in(model, "hf")


def _has_their_decoder(model: EncoderModel) -> TypeGuard[MaskedAutoencoder]:
    """Return whether the model has a decoder with a mask token that predicts pixels, as transformers' does."""
    return isinstance(model, MaskedAutoencoder) and not model.encoder_mask_tokens and isinstance(model.target, Pixels)


def _decoder(model: MaskedAutoencoder) -> dict[str, Any]:
    decoder = model.decoder
    return {
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": len(decoder.blocks),
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": 4 * decoder.width,
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": isinstance(model.target, NormalisedPixels),
    }


def _labels(classes: Sequence[str] | None, count: int) -> dict[str, Any]:
    names = classes or [str(number) for number in range(count)]
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def _preprocessor(image_size: int) -> dict[str, Any]:
    """Return the settings of transformers' processor that resizes and crops as our evaluation does."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": int(image_size / EVALUATION_CROP)},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def _for_timm(model: EncoderModel, classes: Sequence[str] | None) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return the kind, config.json and weights for timm.create_model; of an autoencoder the encoder alone."""
    size, (height, width) = model.encoder.size, height_and_width(model.image_size)
    labels = {}
    if isinstance(model, Classifier):
        state, count = classifier_to_timm(model), model.classes
        pool = "avg" if model.pool == "mean" else "token"
        if classes:
            labels = {"label_names": list(classes)}
    else:
        state, count, pool = weights_in(model, "timm"), 0, "token"
    # Sizes without a name are vit_base_patch16_224 with other model_args; every size is given in them.
    name = next((known for known, found in SIZES.items() if found == size), "vit_base_patch16") + "_224"
    if isinstance(model.encoder, BeitEncoder):  # timm has no BEiT of the size of ViT-H
        name = "beit_large_patch16_224" if name.startswith("vit_large") else "beit_base_patch16_224"
    config = {
        "architecture": name,
        "num_classes": count,
        "num_features": size.width,
        "global_pool": pool,
        **labels,
        "model_args": {
            "img_size": model.image_size,
            "patch_size": size.patch_size,
            "embed_dim": size.width,
            "depth": size.depth,
            "num_heads": size.heads,
            "global_pool": pool,
        },
        "pretrained_cfg": {
            "num_classes": count,
            "input_size": [3, height, width],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": EVALUATION_CROP,
            "crop_mode": "center",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return f"timm's {name}" + ("" if count else ", the encoder"), config, state
