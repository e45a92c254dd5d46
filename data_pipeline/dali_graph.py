"""Build the DALI graph: encoded bytes and a plan in, normalised crops out; the same for CPU and GPU ("mixed") decoding.

It holds no state and reads no file: its output depends on its inputs alone. Apart from the operations of the
augmentations, everything of DALI's graph is here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from data_pipeline.augment.blur import blur_images
from data_pipeline.augment.colour_jitter import jitter_colours
from data_pipeline.augment.crop import resize_crop
from data_pipeline.augment.flip import flip_images
from data_pipeline.augment.kinds import Augmentation, SecondView
from data_pipeline.augment.rand_augment import apply_operations
from data_pipeline.augment.solarise import solarise_images
from data_pipeline.errors import UsageError
from data_pipeline.image_size import ImageSize, height_and_width, size_text
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode
    from nvidia.dali.pipeline import Pipeline

# Options of the decoder on a GPU. An image's pixels must not depend on the images decoded beside it:
# - hw_decoder_load: nvImageCodec gives that share of each batch to the hardware engine (NVJPG), first come first
#   served among its threads, and the rest to CUDA; the two round differently. With 0 each JPEG goes to CUDA.
# - jpeg_fancy_upsampling: colour is up-sampled as libjpeg-turbo does, which decodes data.device=cpu, and here too what
#   nvJPEG does not support.
# - affine: off, as set_affinity below. hybrid_huffman_threshold keeps its default: it chooses by the image's own size.
MIXED_DECODER: dict[str, Any] = {"affine": False, "hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True}


PREFIXES = ("", "second_")
"""What the names of a view's inputs begin with."""


@dataclass(frozen=True)
class Decoding:
    """The settings of decoding: augmentation, size of the output in pixels, device and threads.

    `device` is auto (a GPU where DALI sees one), cpu or gpu, with the GPU's number `device_id`. With
    `exif_orientation` each image is turned by its EXIF orientation before it is cropped, and crops are in turned
    coordinates. `second` asks for a second view of each image, from the same decoded part.
    """

    augmentation: Augmentation
    image_size: ImageSize
    device: str = "auto"
    device_id: int | None = None
    threads: int = 2
    exif_orientation: bool = False
    second: SecondView | None = None

    def __post_init__(self) -> None:
        second = self.second
        for kind, (height, width), _ in self.views:
            if kind.crop == "scaled" and height != width:
                raise UsageError(
                    f"augmentation '{kind.name}' fills images up to a square, and the image size is "
                    f"{size_text((height, width))} px; use a square one"
                )
        if second and second.augmentation and self.augmentation.erasing:
            raise UsageError(
                f"random erasing (probability {self.augmentation.erasing:g}) is not made in pairs of views; "
                "use data.random_erasing=0"
            )
        if second and not second.augmentation and self.augmentation.rand_augment:
            raise UsageError(
                f"augmentation '{self.augmentation.name}' moves parts of an image by whole pixels, so it cannot make a "
                "second view of another size; choose random_resized_crop"
            )

    @property
    def views(self) -> list[tuple[Augmentation, tuple[int, int], bool]]:
        """Augmentation, height and width in pixels, and whether it is normalised, of each view."""
        first, second = (self.augmentation, height_and_width(self.image_size), True), self.second
        if second is None:
            return [first]
        kind = second.augmentation or self.augmentation
        return [first, (kind, height_and_width(second.image_size), second.normalised)]


def import_dali() -> ModuleType:
    """Return the module `nvidia.dali`. Raises UsageError, naming the extra to install, when it is missing."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # DALI raises what OpenCV prints of a refused image
    try:
        import nvidia.dali.backend
        import nvidia.dali.fn
        import nvidia.dali.types
    except ImportError as error:
        raise UsageError(
            f"NVIDIA DALI, which decodes the images, is not installed ({error}); install it, also "
            "without a GPU, with `pip install mae-scale[cuda13]` or `pip install mae-scale[cuda12]`"
        ) from None
    return nvidia.dali


def decoding_device(device: str = "auto") -> str:
    """Return "mixed" or "cpu" for `device` auto (mixed when there is a GPU), gpu or mixed, cpu.

    Raises UsageError when DALI is missing, or a GPU is asked for and DALI sees none.
    """
    if device not in ("auto", "gpu", "mixed", "cpu"):
        raise UsageError(f"data.device is '{device}'; expected auto, cpu or gpu")
    if device == "cpu":
        return "cpu"
    gpus = import_dali().backend.GetCUDADeviceCount()
    if gpus == 0 and device != "auto":
        raise UsageError(f"data.device is '{device}' and DALI finds no GPU; use auto or cpu")
    return "mixed" if gpus else "cpu"


def training_pipeline(decoding: Decoding, max_batch: int, *, device: str, device_id: int | None) -> Pipeline:
    """Return the built pipeline that decodes, crops, resizes, flips, augments and normalises up to `max_batch` images.

    `device` is mixed or cpu. Its inputs are named as the columns of a plan, see `data_pipeline.decoder`; it has an
    output per view, float32 [n, 3, height, width].
    """
    import_dali()
    from nvidia.dali.pipeline import pipeline_def

    # With conditionals, an operation of RandAugment runs on the images for which it was drawn.
    @pipeline_def(enable_conditionals=any(kind.rand_augment for kind, _, _ in decoding.views))
    def graph() -> tuple[DataNode, ...]:
        part = _decoded(decoding, device)
        return tuple(
            _view(part, kind, size, PREFIXES[number], normalised=normalised)
            for number, (kind, size, normalised) in enumerate(decoding.views)
        )

    # Affinity stays off: ranks that share a machine would all be tied to its first cores.
    sizes = {"batch_size": max_batch, "num_threads": decoding.threads, "prefetch_queue_depth": 1}
    pipeline = graph(**sizes, device_id=device_id, set_affinity=False)
    pipeline.build()
    return pipeline


def _view(part: DataNode, kind: Augmentation, output: tuple[int, int], prefix: str, *, normalised: bool) -> DataNode:
    """Return, in a graph, a view (height, width) of each decoded part, its inputs' names beginning with `prefix`."""
    from nvidia.dali import fn
    from nvidia.dali.types import DALIDataType

    def floats(name: str, ndim: int) -> DataNode:
        return fn.external_source(name=prefix + name, dtype=DALIDataType.FLOAT, ndim=ndim)

    def integers(name: str, ndim: int) -> DataNode:
        return fn.external_source(name=prefix + name, dtype=DALIDataType.INT32, ndim=ndim)

    flip = integers("flip", 0)
    scaled = kind.crop == "scaled"
    size = floats("filled", 1) if scaled or kind.crop == "unbounded" else list(output)
    images = resize_crop(part, floats("region_start", 1), floats("region_end", 1), size)
    if kind.colours:
        images = jitter_colours(images, floats("levels", 2), floats("saturation", 0), floats("hue", 0))
    if kind.blur:
        images = blur_images(images, floats("sigma", 0))
    if kind.solarised:
        images = solarise_images(images, integers("thresholds", 0))
    if kind.rand_augment:
        images = flip_images(images, flip)  # before the operations, as timm
        images = apply_operations(images, integers("operations", 1), floats("arguments", 1), floats("matrices", 3))
    if scaled:
        images = flip_images(images, flip)  # before it is filled up
    return fn.crop_mirror_normalize(
        images,
        mirror=0 if kind.rand_augment or scaled else flip,
        **(_filled_up(output) if scaled else {}),
        mean=[255 * value for value in IMAGENET_MEAN] if normalised else [0.0],
        std=[255 * value for value in IMAGENET_STD] if normalised else [255.0],
        dtype=DALIDataType.FLOAT,
        output_layout="CHW",
    )


def _filled_up(output: tuple[int, int]) -> dict[str, Any]:
    """Return the options that fill an image up with zeros, below and to the right, to the output's size."""
    return {
        "crop": output,
        "crop_pos_x": 0.0,
        "crop_pos_y": 0.0,
        "out_of_bounds_policy": "pad",
        "fill_values": 0.0,
    }


def _decoded(decoding: Decoding, device: str) -> DataNode:
    """Return, in a graph, the part of each encoded image that its crop takes: uint8 RGB."""
    from nvidia.dali import fn
    from nvidia.dali.types import DALIDataType, DALIImageType

    return fn.decoders.image_slice(
        fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1),
        fn.external_source(name="crop_start", dtype=DALIDataType.INT32, ndim=1),
        fn.external_source(name="crop_shape", dtype=DALIDataType.INT32, ndim=1),
        axis_names="HW",
        device=device,
        output_type=DALIImageType.RGB,
        adjust_orientation=decoding.exif_orientation,
        **(MIXED_DECODER if device == "mixed" else {}),
    )


def whole_image_pipeline() -> Pipeline:
    """Return the built pipeline that decodes one image at a time on the CPU, whole and as stored."""
    import_dali()
    from nvidia.dali import fn
    from nvidia.dali.pipeline import pipeline_def
    from nvidia.dali.types import DALIDataType, DALIImageType

    @pipeline_def
    def graph() -> DataNode:
        encoded = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
        return fn.decoders.image(encoded, output_type=DALIImageType.RGB, adjust_orientation=False)

    pipeline = graph(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, set_affinity=False)
    pipeline.build()
    return pipeline
