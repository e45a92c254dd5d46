"""RandAugment (Cubuk et al., 2020) as timm's `rand-m9-mstd0.5-inc1`.

Two layers; each applies, with probability 0.5, one of 15 operations whose strength is drawn around magnitude 9.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.arrays import Float32Array, Float64Array, Int32Array, Int64Array
from data_pipeline.image_size import ImageSize, height_and_width

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

LAYERS = 2
NO_OPERATION = -1
PROBABILITY = 0.5
MAGNITUDE, MAGNITUDE_STD, MAGNITUDE_MAX = 9.0, 0.5, 10.0
FILL = (124.0, 116.0, 104.0)  # ImageNet's mean colour in levels of 255, shown beyond the image by geometric operations
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH

# The operations, named after timm's; neighbours share a DALI operator.
OPERATIONS = 15
(
    AUTO_CONTRAST,
    EQUALIZE,
    INVERT,
    POSTERIZE,
    SOLARIZE,
    SOLARIZE_ADD,
    BRIGHTNESS,
    CONTRAST,
    COLOR,
    SHARPNESS,
    ROTATE,
    SHEAR_X,
    SHEAR_Y,
    TRANSLATE_X,
    TRANSLATE_Y,
) = range(OPERATIONS)


def draw_operations(uniform: Float64Array, normal: Float64Array) -> tuple[Int32Array, Float32Array]:
    """Return operations int32 [n, 2] and arguments float32 [n, 2] of `uniform` [n, 2, 3] in [0, 1) (which operation,
    whether it is applied, its sign) and `normal` [n, 2] (standard normal).

    Operations are numbers of the list above, drawn with replacement, or -1 where none is applied.
    """
    operations = (uniform[..., 0] * OPERATIONS).astype(np.int32)
    magnitudes = np.clip(MAGNITUDE + MAGNITUDE_STD * normal, 0, MAGNITUDE_MAX)
    arguments = to_arguments(operations, magnitudes, np.where(uniform[..., 2] < 0.5, -1, 1))
    applied = uniform[..., 1] < PROBABILITY
    return np.where(applied, operations, np.int32(NO_OPERATION)), np.where(applied, arguments, np.float32(0))


def to_arguments(operations: Int32Array, magnitudes: Float64Array, signs: Int64Array) -> Float32Array:
    """Return timm's arguments of `operations` at `magnitudes` in [0, 10]: float32, of the shape of all three.

    Rotate: degrees; Shear: a share; TranslateRel: a share of the width, or height; Posterize: the bits kept; Solarize:
    the threshold; SolarizeAdd: the levels added; the four enhancements: the factor, 1 for no change. `signs` (1 or
    -1) turn rotations, shears and translations round and say whether a factor is above or below 1.
    """
    level = magnitudes / 10
    signed = signs * level
    none, enhanced = 0 * level, np.maximum(0.1, 1 + signed * 0.9)
    by_operation = [
        *[none] * 3,
        4 - np.floor(level * 4),
        256 - np.floor(level * 256),
        np.floor(level * 110),
        *[enhanced] * 4,
        signed * 30,
        *[signed * 0.3] * 2,
        *[signed * 0.45] * 2,
    ]
    return np.choose(operations, by_operation).astype(np.float32)


def to_matrices(operations: Int32Array, arguments: Float32Array, image_size: ImageSize) -> Float32Array:
    """Return the matrices that map each pixel of the output to its place in the input, in pixels from the corner:
    float32 [..., 3, 3] of operations and arguments [...], the identity for operations that are not geometric.

    Rotations are about the centre, counter-clockwise as in Pillow.
    """
    height, width = height_and_width(image_size)
    angle = np.radians(arguments, dtype=np.float64)
    cos, sin, rotate = np.cos(angle), np.sin(angle), operations == ROTATE
    # So arranged that a square's numbers keep every bit: runs go on from checkpoints of before.
    across, down = width / 2 * (1 - cos + height / width * sin), height / 2 * (1 - cos - width / height * sin)
    matrices = np.tile(np.eye(3, dtype=np.float32), (*operations.shape, 1, 1))
    matrices[..., 0, 0] = matrices[..., 1, 1] = np.where(rotate, cos, 1)
    matrices[..., 0, 1] = np.select([rotate, operations == SHEAR_X], [-sin, arguments])
    matrices[..., 1, 0] = np.select([rotate, operations == SHEAR_Y], [sin, arguments])
    matrices[..., 0, 2] = np.select([rotate, operations == TRANSLATE_X], [across, arguments * width])
    matrices[..., 1, 2] = np.select([rotate, operations == TRANSLATE_Y], [down, arguments * height])
    return matrices


def apply_operations(images: DataNode, operations: DataNode, arguments: DataNode, matrices: DataNode) -> DataNode:
    """Apply both layers of operations to uint8 RGB images [H, W, 3], in a DALI graph with conditionals.

    `operations` [2], `arguments` [2] and `matrices` [2, 3, 3] (of `to_matrices`) are on the host.
    """
    for layer in range(LAYERS):
        images = _apply(images, operations[layer], arguments[layer], matrices[layer])
    return images


def _apply(images: DataNode, operation: DataNode, argument: DataNode, matrix: DataNode) -> DataNode:
    """Apply one operation to each image.

    Pillow, and so timm, differs: its geometric operations stop at the image's edge, where these blend the last pixels
    with the fill colour, and its bicubic coefficient is -0.5, here OpenCV's -0.75; equalising rounds its step to a
    whole number of pixels, which matters in images of less than about 200 pixels; sharpness leaves the outermost pixels
    unchanged.
    """
    from nvidia.dali import fn, math
    from nvidia.dali.types import Constant, DALIDataType, DALIInterpType

    white = Constant(255, dtype=DALIDataType.UINT8)  # x ^ white is 255 - x
    if operation >= ROTATE:
        images = fn.experimental.warp_perspective(
            images,
            matrix=matrix,
            interp_type=DALIInterpType.INTERP_CUBIC,
            border_mode="constant",
            fill_value=list(FILL),
        )
    elif operation >= BRIGHTNESS:
        images = _enhance(images, operation, argument)
    elif operation == SOLARIZE_ADD:
        images = images + (images < 128) * _uint8(argument)
    elif operation == SOLARIZE:
        images = images ^ ((images >= argument) * white)
    elif operation == POSTERIZE:
        # at magnitude 10 no bits are left: black, where newer versions of Pillow raise an error
        images = images & _uint8(256.0 - math.pow(2.0, 8.0 - argument))
    elif operation == INVERT:
        images = images ^ white
    elif operation == EQUALIZE:
        # Pillow counts the darker pixels, DALI (as OpenCV) also the equally dark: on the negative they agree
        images = fn.equalize(images ^ white) ^ white
    elif operation == AUTO_CONTRAST:
        low = fn.reductions.min(images, axis_names="HW", keep_dims=True)
        high = fn.reductions.max(images, axis_names="HW", keep_dims=True)
        flat = high == low  # a channel of one value stays as it is
        scale = 255.0 / (high - low + flat * white)
        images = _linear(images, scale, -scale * low * (high > low))
    return images


def _enhance(images: DataNode, operation: DataNode, factor: DataNode) -> DataNode:
    """Apply Pillow's ImageEnhance: `factor` x the image + (1 - `factor`) x the grey image (colour), its mean
    (contrast), the smoothed image (sharpness) or black (brightness)."""
    from nvidia.dali import fn
    from nvidia.dali.types import Constant, DALIImageType

    if operation == SHARPNESS:
        smooth = fn.filter(images, Constant(SMOOTH, device=images.device), border="clamp")
        images = _linear(images, factor, smooth * (1.0 - factor))
    elif operation == BRIGHTNESS:
        images = _linear(images, factor, 0.0)
    else:
        grey = fn.color_space_conversion(images, image_type=DALIImageType.RGB, output_type=DALIImageType.GRAY)
        if operation == CONTRAST:
            grey = _uint8(fn.reductions.mean(grey, axis_names="HW", keep_dims=True))
        images = _linear(images, factor, grey * (1.0 - factor))
    return images


def _linear(images: DataNode, scale: DataNode, offset: DataNode | float) -> DataNode:
    """Return images x scale + offset, truncated to whole levels as in Pillow; DALI rounds."""
    return _uint8(images * scale + (offset - 0.4999))


def _uint8(values: DataNode) -> DataNode:
    from nvidia.dali import fn
    from nvidia.dali.types import DALIDataType

    return fn.cast(values, dtype=DALIDataType.UINT8)  # rounded and clipped
