"""Decode, crop, augment and normalise batches with DALI, and tell bad images from a machine that failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.arrays import Uint8Array
from data_pipeline.augment.blur import UNBLURRED
from data_pipeline.augment.colour_jitter import jitter_slots
from data_pipeline.augment.kinds import Augmentation
from data_pipeline.augment.rand_augment import to_matrices
from data_pipeline.dali_errors import CROP_OUTSIDE, control_image, machine_failure, names_an_image, reason_in
from data_pipeline.dali_graph import (
    PREFIXES,
    Decoding,
    decoding_device,
    import_dali,
    training_pipeline,
    whole_image_pipeline,
)
from data_pipeline.decoder_stderr import caught
from data_pipeline.errors import BadImage
from data_pipeline.plan import BatchPlan

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.tensors import TensorListCPU, TensorListGPU

    Decoded = TensorListCPU | TensorListGPU
    Views = tuple[Decoded, ...]


class Decoder:
    """A decoder that also crops, resizes, flips, augments and normalises up to `max_batch` images at a time.

    `device` is "cpu" (`device_id` is None), or "mixed" with the GPU `device_id`. `damage` has a line for each image of
    the last batch that is damaged, yet was decoded; the decoders do not say which. Not safe to call from two threads at
    once.
    """

    def __init__(self, decoding: Decoding, max_batch: int):
        import_dali()
        self.decoding, self.max_batch = decoding, max_batch
        self.device = decoding_device(decoding.device)
        self.device_id = (decoding.device_id or 0) if self.device == "mixed" else None
        self.damage: list[str] = []
        self._pipeline: Pipeline | None = None

    def decode(self, encoded: list[Uint8Array], plan: BatchPlan) -> Views:
        """Return a DALI tensor list per view, float32 [n, 3, height, width], of `encoded` (uint8 arrays) cut by `plan`.

        The host's part is finished when this returns; a list stays valid while something refers to it. Raises
        BadImage when an image (DALI does not say which) cannot be decoded, and RunError when no image is the cause, as
        for lack of memory.
        """
        try:
            return self._run(encoded, plan)
        except (RuntimeError, MemoryError) as error:
            self._pipeline = None  # DALI calls it "no longer valid"
            if not names_an_image(error):
                raise machine_failure(error, len(encoded), self.device_id) from error
            if len(encoded) == 1 and CROP_OUTSIDE not in str(error):
                self._decode_control(encoded[0], plan)
            said = self.damage[0] if len(encoded) == 1 and self.damage else reason_in(error)
            raise BadImage(f"cannot be decoded ({said})") from error

    def _decode_control(self, refused: Uint8Array, plan: BatchPlan) -> None:
        """Decode a sound image of the size of the `refused` one. Raises RunError when that fails too."""
        try:
            control = control_image(refused)
            if control is not None:
                self._run([control], plan)
        except (RuntimeError, MemoryError) as error:
            self._pipeline = None
            if CROP_OUTSIDE not in str(error):
                raise machine_failure(error, 1, self.device_id, memory=names_an_image(error)) from error

    def _run(self, encoded: list[Uint8Array], plan: BatchPlan) -> Views:
        if self._pipeline is None:
            self._pipeline = self._build()
        inputs = {
            "encoded": encoded,
            "crop_start": np.ascontiguousarray(plan.crops[:, :2]),
            "crop_shape": np.ascontiguousarray(plan.crops[:, 2:]),
        }
        for prefix, (kind, size, _), view in zip(PREFIXES, self.decoding.views, (plan, plan.second), strict=False):
            assert view is not None, "a plan for one view, and a decoding of two"
            inputs |= {prefix + name: column for name, column in _view_inputs(kind, size, view).items()}
        with caught() as self.damage:
            return tuple(self._pipeline.run(**inputs))

    def close(self) -> None:
        """Release the pipeline, its threads and its memory."""
        self._pipeline = None

    def _build(self) -> Pipeline:
        return training_pipeline(self.decoding, self.max_batch, device=self.device, device_id=self.device_id)


def _view_inputs(kind: Augmentation, image_size: tuple[int, int], plan: BatchPlan) -> dict[str, np.ndarray]:
    """Return the inputs of a view's graph, by their names without prefix."""
    inputs: dict[str, np.ndarray] = {
        "region_start": np.ascontiguousarray(plan.regions[:, :2]),
        "region_end": np.ascontiguousarray(plan.regions[:, 2:]),
        "flip": plan.flips,
    }
    if kind.crop in ("scaled", "unbounded"):
        inputs["filled"] = plan.filled.astype(np.float32)
    if kind.colours:
        inputs["levels"], inputs["saturation"] = jitter_slots(plan.jitter, plan.jitter_order)
        inputs["hue"] = plan.hue
    if kind.blur:
        inputs["sigma"] = np.maximum(plan.blur * np.float32(min(image_size)), np.float32(UNBLURRED))
    if kind.solarised:
        inputs["thresholds"] = plan.solarise
    if kind.rand_augment:
        inputs["operations"], inputs["arguments"] = plan.operations, plan.arguments
        inputs["matrices"] = to_matrices(plan.operations, plan.arguments, image_size)
    return inputs


class WholeDecoder:
    """A decoder of one image at a time on the CPU, whole and as stored."""

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None

    def size(self, encoded: Uint8Array) -> tuple[int, int]:
        """Decode an image, uint8 [bytes], and return its height and width. Raises DALI's RuntimeError."""
        try:
            self._pipeline = self._pipeline or whole_image_pipeline()
            height, width, _ = self._pipeline.run(encoded=[encoded])[0].as_cpu().at(0).shape
            return height, width
        except RuntimeError:
            self._pipeline = None  # DALI calls it "no longer valid"
            raise
