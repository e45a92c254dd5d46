"""Interpret DALI's errors: a decoder refused an image, or the machine failed, mostly for lack of memory.

An image may be replaced by another only when it is the cause. DALI's text alone does not tell: it hides a
failed allocation inside a decoder behind "Failed to decode sample". So a refused image counts as bad only when
a sound image of its size can be decoded in its place, and every error that names no image stops the run.
"""

from __future__ import annotations

import io
import re
import resource

import numpy as np

from data_pipeline.arrays import Uint8Array
from data_pipeline.errors import BadImage, RunError
from data_pipeline.image_header.read import read_header

CROP_OUTSIDE = "The cropping window"  # the image is smaller than the index says
LARGEST_CONTROL = 2**28  # pixels; above this no control image is made

# nvImageCodec's status codes (nvimgcodec.h): 3, 13 bad code stream; 4, 14 and 9, 18 unsupported; 19 incomplete;
# 17 internal error of a parser, as for a PNG that ends early.
_REFUSED = re.compile(
    rf"Failed to decode sample #|nvImageCodec failure: '#(3|4|9|13|14|17|18|19)'|Invalid sample_type|{CROP_OUTSIDE} "
)

# Texts of DALI 2.4, nvImageCodec 0.9, the CUDA runtime and driver, nvJPEG and OpenCV; codes 5, 15: allocator failure;
# "Resource temporarily unavailable": a thread that cannot be started.
_MEMORY = re.compile(
    r"bad_alloc|allocation failed|can(no|')t allocate|failed to allocate|out[ _]of[ _]memory|memoryallocation"
    r"|(insufficient|not enough) memory|resource temporarily unavailable|allocator[ _]?(error|fail)"
    r"|nvImageCodec failure: '#1?5'",
    re.IGNORECASE,
)


def reason_in(error: Exception) -> str:
    """Return the line of DALI's message that gives the reason."""
    _, _, rest = str(error).rpartition("encountered:")
    lines = [line.strip() for line in rest.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Current pipeline object", "C++ context"))]
    lines = [line for line in lines if line != "Critical error in pipeline:"]
    return lines[0].rstrip(" :") if lines else type(error).__name__


def names_an_image(error: Exception) -> bool:
    """Return whether a decoder refused an image; the machine can still be the cause."""
    return bool(_REFUSED.search(reason_in(error)))


def control_image(encoded: Uint8Array) -> Uint8Array | None:
    """Return a sound JPEG, uint8 [bytes], of the height and width of `encoded`; None when its header gives none.

    It is progressive, the kind that takes a decoder the most memory. Raises MemoryError.
    """
    try:
        header = read_header(lambda offset, length: encoded[offset : offset + length].tobytes(), len(encoded))
    except BadImage:
        return None
    if header.height * header.width > LARGEST_CONTROL:
        return None
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (header.width, header.height)).save(file, "JPEG", progressive=True)
    return np.frombuffer(file.getvalue(), np.uint8)


def machine_failure(error: Exception, num_images: int, device_id: int | None, *, memory: bool = False) -> RunError:
    """Return the error that stops the run; `memory`: it is known that memory ran out, whatever the text says."""
    what = f"DALI cannot decode a batch of {num_images} images"
    if not memory and not isinstance(error, MemoryError) and not _MEMORY.search(str(error)):
        return RunError(
            f"{what}, and no image is the cause ({reason_in(error)}); the same command goes on from the last checkpoint"
        )
    advice = "a smaller engine.micro_batch or fewer data.threads" + (", or data.device=cpu" * (device_id is not None))
    return RunError(f"{what} for lack of memory ({reason_in(error)}); {_held(device_id)}; choose {advice}")


def _held(device_id: int | None) -> str:
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    held = f"this process has held up to {peak_gib:.1f} GiB"
    if device_id is None:
        return held
    import torch

    try:
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device_id))
    except RuntimeError:  # a failed device does not answer
        return held
    return f"GPU {device_id} has {free:.1f} of {total:.1f} GiB free, {held}"
