"""A bad image is replaced; a machine that lacks memory or fails stops the run. DALI raises RuntimeError for both."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipeline.augment.kinds import augmentation
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import TrainingOrder
from data_pipeline.byte_reader import ByteReader
from data_pipeline.decoder import Decoder
from data_pipeline.errors import BadImage, RunError
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from data_pipeline.plan import plan_batch
from tests.loaders import on_cpu

FRAME = """Critical error in pipeline:
Error in {kind} operator `nvidia.dali.fn.decoders.image_slice`,
which was used in the pipeline definition with the following traceback:

  File "pipelines.py", line 1, in graph
    images = fn.decoders.image_slice(

encountered:

{text}
C++ context: [/opt/dali/dali/core/mm/default_resources.cc:1]
Current pipeline object is no longer valid.
"""

LACK_OF_MEMORY = [
    "std::bad_alloc",
    "CUDA allocation failed",
    "Can't allocate 129499136 bytes on device 0.",
    "Can't allocate 129499136 bytes on host.",
    "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory",
    "CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2):\nout of memory",
    "nvJPEG error (5): NVJPEG_STATUS_ALLOCATOR_FAILURE",
    "nvImageCodec failure: '#5'",
    "nvImageCodec failure: '#15'",
    "OpenCV(4.13.0) alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 27000000 bytes",
    "Cannot allocate memory",
    "Resource temporarily unavailable",
]

OTHER_FAILURES = [
    "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access was encountered",
    "nvImageCodec failure: '#6'",
    "nvImageCodec failure: '#21'",
    "Failed to retrieve processing status",
]

REFUSALS = ["Failed to decode sample #1 : ", "nvImageCodec failure: '#3'", "nvImageCodec failure: '#17'"]


def jpeg(height=300, width=400, mode="RGB", kind="JPEG", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height // 10, width // 10, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def index(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(300 + number))
    return build_index(tmp_path, workers=1, progress=False)


def setting(index, count=4):
    """A decoder, the bytes of the first images, and the plan for them."""
    kind = augmentation("evaluation")
    rows = np.arange(count)
    plan = plan_batch(index, kind, seed=0, number=0, global_batch=count, sample_ids=rows, image_size=32)
    reader = ByteReader(index)
    return Decoder(on_cpu(kind="evaluation"), 4), [reader.read(int(row)) for row in rows], plan


class Failing:
    """A pipeline that raises DALI's text when any image, or one that does not equal `sound`, is decoded."""

    def __init__(self, text: str, kind: str = "CPU", sound: bytes | None = None):
        self.error = RuntimeError(FRAME.format(kind=kind, text=text))
        self.sound = sound

    def run(self, encoded, **_):
        if self.sound is None or encoded[0].tobytes() != self.sound:
            raise self.error
        return ["decoded"]


@pytest.mark.parametrize("text", LACK_OF_MEMORY)
@pytest.mark.parametrize("count", [1, 4])
def test_lack_of_memory_stops_with_one_line_that_says_what_to_do(index, text, count, monkeypatch):
    decoder, encoded, plan = setting(index, count)
    monkeypatch.setattr(decoder, "_build", lambda: Failing(text))
    with pytest.raises(RunError) as stopped:
        decoder.decode(encoded, plan)
    said = str(stopped.value)
    assert "\n" not in said
    assert f"a batch of {count} images for lack of memory ({text.splitlines()[0].rstrip(' :')})" in said
    assert "GiB" in said
    assert "engine.micro_batch" in said


@pytest.mark.parametrize("text", OTHER_FAILURES)
def test_a_failure_that_names_no_image_stops_the_run_too(index, text, monkeypatch):
    decoder, encoded, plan = setting(index)
    monkeypatch.setattr(decoder, "_build", lambda: Failing(text))
    with pytest.raises(RunError, match="no image is the cause") as stopped:
        decoder.decode(encoded, plan)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("text", REFUSALS)
def test_a_refused_image_is_bad_only_when_a_sound_one_of_its_size_can_be_decoded(index, text, monkeypatch):
    """The same text comes from a decoder that cannot get its memory."""
    decoder, encoded, plan = setting(index, 1)
    monkeypatch.setattr(decoder, "_build", lambda: Failing(text))
    with pytest.raises(RunError, match="for lack of memory"):
        decoder.decode(encoded, plan)
    from data_pipeline.dali_errors import control_image

    control = control_image(encoded[0])
    assert Image.open(io.BytesIO(control.tobytes())).size == (400, 300)
    monkeypatch.setattr(decoder, "_build", lambda: Failing(text, sound=control.tobytes()))
    with pytest.raises(BadImage, match="cannot be decoded"):
        decoder.decode(encoded, plan)


def garbled(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


BAD = {
    "huffman tables": lambda good: garbled(good, good.index(b"\xff\xc4") + 5, b"\xff" * 16),
    "cut, with an end marker": lambda good: good[:600] + b"\xff\xd9",
    "no scan": lambda good: good[: good.index(b"\xff\xda")] + b"\xff\xd9",
    "garbage between the markers": lambda good: b"\xff\xd8" + bytes(range(256)) * 8 + b"\xff\xd9",
    "sampling factors": lambda good: garbled(good, good.index(b"\xff\xc0") + 11, b"\x55"),
    "12 bits": lambda good: garbled(good, good.index(b"\xff\xc0") + 4, b"\x0c"),
    "two colours": lambda good: garbled(good, good.index(b"\xff\xc0") + 9, b"\x02"),
    "CMYK sampling factors": lambda good: (lambda cmyk: garbled(cmyk, cmyk.index(b"\xff\xc0") + 11, b"\x55"))(
        jpeg(mode="CMYK")
    ),
    "lossless": lambda good: garbled(good, good.index(b"\xff\xc0") + 1, b"\xc3"),
    "smaller than indexed": lambda good: jpeg(30, 40),
    "huge": lambda good: garbled(good, good.index(b"\xff\xc0") + 5, b"\xff\xdc\xff\xdc"),
    "PNG with damaged data": lambda good: (lambda png: garbled(png, 60, bytes(30)))(jpeg(kind="PNG")),
    "GIF": lambda good: jpeg(kind="GIF"),
    "text": lambda good: b"<html>not found</html>" * 20,
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_image_is_still_a_bad_image(index, case):
    decoder, encoded, plan = setting(index, 1)
    bad = np.frombuffer(BAD[case](encoded[0].tobytes()), np.uint8)
    with pytest.raises(BadImage, match="cannot be decoded"):
        decoder.decode([bad], plan)
    decoder.decode(encoded, plan)


def test_a_loader_replaces_a_bad_image_and_stops_for_lack_of_memory(index, tmp_path, monkeypatch):
    path = tmp_path / "2.jpg"
    path.write_bytes(BAD["huffman tables"](path.read_bytes()))
    order = TrainingOrder(batch_layout(4), stop_step=1)
    with ImageLoader(index, order, on_cpu()) as loader:
        assert [batch.replaced for batch in loader] == [1]
        assert list(loader.bad_images.found) == ["2.jpg"]
    monkeypatch.setattr(Decoder, "_build", lambda self: Failing(LACK_OF_MEMORY[2]))
    with ImageLoader(index, order, on_cpu()) as loader:
        with pytest.raises(RunError, match="for lack of memory"):
            list(loader)
        assert loader.bad_images.found == {}


LIMITED = """
import resource, sys
import PIL.Image
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import TrainingOrder
from data_pipeline.errors import RunError
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from tests.loaders import on_cpu

PIL.Image.init()
index = build_index(sys.argv[1], workers=1, progress=False)
order = TrainingOrder(batch_layout(len(index)), stop_step=1)
decoding = on_cpu(kind="evaluation", threads=1)
with ImageLoader(index, order, decoding) as loader:
    list(loader)  # the libraries are loaded
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for room_mib in range(60, 500, 80):
    resource.setrlimit(resource.RLIMIT_AS, (in_use + room_mib * 2**20, -1))
    with ImageLoader(index, order, decoding) as loader:
        try:
            list(loader)
        except RunError as error:
            print(len(loader.bad_images.found), error)
        else:
            print("bad images:", loader.bad_images.found)
            break
"""


@pytest.mark.parametrize("count", [1, 2])
def test_memory_that_really_runs_out_makes_no_image_bad(tmp_path, count):
    for number in range(count):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(6000, 6000))  # 103 MiB of pixels, more than malloc keeps
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, timeout=120)
    *failures, last = done.stdout.splitlines()
    assert last == "bad images: {}", done.stdout + done.stderr
    assert failures
    assert all(line.startswith("0 ") for line in failures), failures
    assert all("for lack of memory" in line for line in failures), failures
