"""The DALI graph: encoded bytes and a plan in, normalised crops out. One graph for CPU and GPU ("mixed")
decoding.

It holds no state and reads no file: what it gives depends on its inputs alone.
"""

from __future__ import annotations

import os

import numpy as np

from data_pipeline.augmentations import Augmentation, jitter_colours, jitter_slots, resize_crop
from data_pipeline.decoder_messages import caught
from data_pipeline.decoding_failures import CROP_OUTSIDE, control_image, machine_failure, names_an_image, reason_of
from data_pipeline.headers import BadImage
from data_pipeline.order import BatchPlan
from data_pipeline.rand_augment import apply_operations, to_matrices
from mae_scale.errors import UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Options of the decoder on a GPU. An image's pixels must not depend on the images decoded beside it:
# - hw_decoder_load: nvImageCodec gives that share of each batch to the hardware engine (NVJPG), first come first
#   served among its threads, and the rest to CUDA; the two round differently. With 0 each JPEG goes to CUDA.
# - jpeg_fancy_upsampling: colour is up-sampled as libjpeg-turbo does, which decodes data.device=cpu, and here too what
#   nvJPEG does not support.
# - affine: off, as set_affinity below. hybrid_huffman_threshold keeps its default: it chooses by the image's own size.
MIXED_DECODER = {"affine": False, "hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True}


def import_dali():
    """The module `nvidia.dali`. Raises UsageError naming the extra to install."""
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # what it says of an image that it refuses, DALI raises
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
    """ "mixed" or "cpu" for `device` auto (mixed when there is a GPU), gpu or mixed, cpu.

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


class Decoder:
    """Decodes, crops, resizes, flips, augments and normalises up to `max_batch` images at a time.

    `device` is "cpu" or "mixed" (with `device_id`); `threads` decode. With `exif_orientation` the images are turned
    first, and crops are in turned coordinates. `damage` has a line for each image of the last batch that is damaged,
    yet was decoded; which, the decoders do not say. Not safe to call from two threads at once.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        image_size: int,
        max_batch: int,
        *,
        device: str = "cpu",
        device_id: int | None = None,
        threads: int = 2,
        exif_orientation: bool = False,
    ):
        import_dali()
        self.augmentation, self.image_size, self.max_batch = augmentation, image_size, max_batch
        self.device, self.threads, self.exif_orientation = device, threads, exif_orientation
        self.damage: list[str] = []
        self.device_id = (device_id or 0) if device == "mixed" else None
        self._pipeline = None

    def decode(self, encoded: list[np.ndarray], plan: BatchPlan):
        """A DALI tensor list, float32 [n, 3, image_size, image_size], of `encoded` (uint8 arrays) cut by
        `plan`.

        It is finished on the host's side when this returns, and stays valid while it is referred to.
        Raises BadImage (about one of the images; which, DALI does not say) when it cannot be decoded, and
        RunError when no image is the cause, as for lack of memory.
        """
        try:
            return self._run(encoded, plan)
        except (RuntimeError, MemoryError) as error:
            self._pipeline = None  # DALI calls it "no longer valid"
            if not names_an_image(error):
                raise machine_failure(error, len(encoded), self.device_id) from error
            if len(encoded) == 1 and CROP_OUTSIDE not in str(error):
                self._decode_control(encoded[0], plan)
            said = self.damage[0] if len(encoded) == 1 and self.damage else reason_of(error)
            raise BadImage(f"cannot be decoded ({said})") from error

    def _decode_control(self, refused: np.ndarray, plan: BatchPlan) -> None:
        """Decode a sound image of the size of the `refused` one; RunError when that fails too."""
        try:
            control = control_image(refused)
            if control is not None:
                self._run([control], plan)
        except (RuntimeError, MemoryError) as error:
            self._pipeline = None
            if CROP_OUTSIDE not in str(error):
                raise machine_failure(error, 1, self.device_id, memory=names_an_image(error)) from error

    def _run(self, encoded: list[np.ndarray], plan: BatchPlan):
        if self._pipeline is None:
            self._pipeline = self._build()
        inputs = {
            "encoded": encoded,
            "crop_start": np.ascontiguousarray(plan.crops[:, :2]),
            "crop_shape": np.ascontiguousarray(plan.crops[:, 2:]),
            "region_start": np.ascontiguousarray(plan.regions[:, :2]),
            "region_end": np.ascontiguousarray(plan.regions[:, 2:]),
            "flip": plan.flips,
        }
        if self.augmentation.jitter:
            inputs["levels"], inputs["saturation"] = jitter_slots(plan.jitter, plan.jitter_order)
        if self.augmentation.rand_augment:
            inputs["operations"], inputs["arguments"] = plan.operations, plan.arguments
            inputs["matrices"] = to_matrices(plan.operations, plan.arguments, self.image_size)
        with caught() as self.damage:
            return self._pipeline.run(**inputs)[0]

    def close(self) -> None:
        """Let go of the pipeline, its threads and its memory."""
        self._pipeline = None

    def _build(self):
        dali = import_dali()
        fn, types = dali.fn, dali.types

        # With conditionals, an operation of RandAugment runs on the images for which it was drawn.
        @dali.pipeline_def(enable_conditionals=self.augmentation.rand_augment)
        def graph():
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            start = fn.external_source(name="crop_start", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="crop_shape", dtype=types.INT32, ndim=1)
            region_start = fn.external_source(name="region_start", dtype=types.FLOAT, ndim=1)
            region_end = fn.external_source(name="region_end", dtype=types.FLOAT, ndim=1)
            mirror = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            images = fn.decoders.image_slice(
                encoded,
                start,
                shape,
                axis_names="HW",
                device=self.device,
                output_type=types.RGB,
                adjust_orientation=self.exif_orientation,
                **(MIXED_DECODER if self.device == "mixed" else {}),
            )
            images = resize_crop(images, region_start, region_end, self.image_size)
            if self.augmentation.jitter:
                levels = fn.external_source(name="levels", dtype=types.FLOAT, ndim=2)
                saturation = fn.external_source(name="saturation", dtype=types.FLOAT, ndim=0)
                images = jitter_colours(images, levels, saturation)
            if self.augmentation.rand_augment:
                operations = fn.external_source(name="operations", dtype=types.INT32, ndim=1)
                arguments = fn.external_source(name="arguments", dtype=types.FLOAT, ndim=1)
                matrices = fn.external_source(name="matrices", dtype=types.FLOAT, ndim=3)
                images = fn.flip(images, horizontal=mirror)  # before the operations, as timm
                mirror = 0
                images = apply_operations(images, operations, arguments, matrices)
            return fn.crop_mirror_normalize(
                images,
                mirror=mirror,
                mean=[255 * value for value in IMAGENET_MEAN],
                std=[255 * value for value in IMAGENET_STD],
                dtype=types.FLOAT,
                output_layout="CHW",
            )

        # Affinity stays off: ranks that share a machine would all be tied to its first cores.
        pipeline = graph(
            batch_size=self.max_batch,
            num_threads=self.threads,
            device_id=self.device_id,
            prefetch_queue_depth=1,
            set_affinity=False,
        )
        pipeline.build()
        return pipeline


class WholeDecoder:
    """Decodes one image at a time on the CPU, whole and as stored."""

    def __init__(self):
        self._pipeline = None

    def size(self, encoded: np.ndarray) -> tuple[int, int]:
        """Decode an image (uint8 [bytes]); return the height and width it has then. Raises RuntimeError, as DALI."""
        try:
            self._pipeline = self._pipeline or self._build()
            return tuple(self._pipeline.run(encoded=[encoded])[0].at(0).shape[:2])
        except RuntimeError:
            self._pipeline = None  # DALI calls it "no longer valid"
            raise

    def _build(self):
        dali = import_dali()

        @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, set_affinity=False)
        def graph():
            encoded = dali.fn.external_source(name="encoded", dtype=dali.types.UINT8, ndim=1)
            return dali.fn.decoders.image(encoded, output_type=dali.types.RGB, adjust_orientation=False)

        pipeline = graph()
        pipeline.build()
        return pipeline
