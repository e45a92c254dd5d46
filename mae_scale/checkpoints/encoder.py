"""A pre-trained encoder for other programs: `mae_scale.load_encoder`."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from data_pipeline.augment.crop import covering
from data_pipeline.errors import UsageError
from data_pipeline.image_size import height_and_width
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from mae_scale.checkpoints.export import grid_of_weights, naming, starting_point, weights_of
from mae_scale.checkpoints.store import read_manifest
from mae_scale.config.load import stored_recipe
from mae_scale.models.beit import TABLE
from mae_scale.models.build import size_of
from mae_scale.models.classifier import Classifier, build_classifier
from mae_scale.models.vit import SIZES, ViTSize, patchify
from mae_scale.models.weights.beit import grid_in, is_beit
from mae_scale.models.weights.classifier import load_classifier, release_names, square_grid
from mae_scale.models.weights.files import StateDict

HEAD = ("head.", "lm_head.", "batch_norm.")


class PretrainedEncoder(nn.Module):
    """An encoder with its weights, in evaluation mode, its `size` and its `image_size` in pixels.

    image_size is the side of square images, else (height, width); an image has `patches` patches.
    `transform` prepares a PIL image as evaluation does: [3, H, W] float32, normalised by ImageNet's mean and std.
    """

    def __init__(self, classifier: Classifier):
        super().__init__()
        self._classifier = classifier
        self.size, self.image_size = classifier.encoder.size, classifier.image_size
        self.patches = classifier.encoder.patches
        self.eval()

    def forward_features(self, images: Tensor) -> Tensor:
        """Return tokens [B, 1 + L, D] of images [B, 3, H, W] from `transform`: cls first, then patches row by row.

        After the final norm; of a classifier that pools the mean, which norms the pooled feature, after the last block.
        """
        return self._classifier.encoder(patchify(images, self.size.patch_size))

    def forward(self, images: Tensor) -> Tensor:
        """Return the pooled feature [B, D] of images [B, 3, H, W]: the cls token, or the mean where it pools that."""
        return self._classifier.features(images)

    def transform(self, image: Image) -> Tensor:
        """Return a PIL image as float32 [3, H, W]: resized to cover H / 0.875 x W / 0.875, the centre cropped."""
        resized = covering(np.array([[image.height, image.width]]), self.image_size)[0].tolist()
        steps = v2.Compose(
            [
                v2.Resize(resized, v2.InterpolationMode.BICUBIC),
                v2.CenterCrop(height_and_width(self.image_size)),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
        return steps(image.convert("RGB"))


def load_encoder(path: str | Path, *, heads: int | None = None) -> PretrainedEncoder:
    """Return the encoder of a run's folder, a checkpoint, or a file of weights in any known layout, on the host.

    Layouts: ours, the authors' release, timm's, Hugging Face's; pre-trained or fine-tuned; also of a BEiT, whose
    published files (not BEiT v2's) were trained on images normalised by 0.5 and not as `transform` does. A file does
    not hold its number of attention heads: `heads` gives it for a model other than ViT-B/16, L/16 and H/14. Nor does a
    file that was not exported here say which rows and columns its positions have: they are taken for a square's.
    Raises UsageError when there is nothing usable at that place, RunError when a checkpoint is damaged.
    """
    source = starting_point(Path(path))
    given, _ = release_names(weights_of(source))
    given = {key: value for key, value in given.items() if not key.startswith(HEAD)}
    patch_size, width, depth, grid = _shape(given, source)
    size = ViTSize(patch_size, width, depth, heads or _heads(source, patch_size, width, depth))
    model = build_classifier(
        classes=2,
        image_size=(grid[0] * patch_size, grid[1] * patch_size),
        **vars(size),
        pool="mean" if any(key.startswith("fc_norm.") for key in given) else "cls",
        layer_scale=1.0 if is_beit(given) else None,  # its values are in the file
    )
    with naming(source):
        load_classifier(model, given, grid)
    return PretrainedEncoder(model.requires_grad_(False))


def _shape(given: StateDict, source: Path) -> tuple[int, int, int, tuple[int, int]]:
    """Return patch size, width, depth, and rows and columns of patches of the weights, by the release's names."""
    projection, positions = given.get("patch_embed.proj.weight"), given.get("pos_embed")
    blocks = [int(found[1]) for key in given if (found := re.match(r"blocks\.(\d+)\.", key))]
    tables = any(key.endswith(TABLE) for key in given)
    if projection is None or projection.ndim != 4 or not blocks or (positions is None and not tables):
        raise UsageError(f"{source} does not hold the weights of a Vision Transformer with its positions")
    grid = grid_of_weights(source) or (grid_in(given) if positions is None else square_grid(positions.shape[1] - 1))
    if grid is None:
        raise UsageError(
            f"{source} has positions of no square of patches, and does not say their rows and columns; give the run's "
            "folder, a checkpoint, or a file that `mae-scale export` wrote"
        )
    return projection.shape[-1], projection.shape[0], max(blocks) + 1, grid


def _heads(source: Path, patch_size: int, width: int, depth: int) -> int:
    if source.is_dir():
        return size_of(stored_recipe(read_manifest(source)["recipe"], str(source)).model).heads
    for size in SIZES.values():
        if (size.patch_size, size.width, size.depth) == (patch_size, width, depth):
            return size.heads
    raise UsageError(
        f"{source} is a model of patch {patch_size} px, width {width} and {depth} blocks, which does not say "
        "its number of attention heads; give it: load_encoder(PATH, heads=N)"
    )
