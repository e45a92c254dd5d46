"""Images that a decoder puts up with: found by `data verify --deep`, and named once in a training's log."""

import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from data_pipeline.batches import _damaged
from data_pipeline.dali_graph import Decoding
from data_pipeline.decoder import Decoder
from tests.image_types import DEEP, READ, encoded, write_all
from tests.tiny import TINY, losses


def photo() -> Image.Image:
    return Image.fromarray(load_sample_images().images[1]).resize((240, 180))


def kinds_of_jpeg() -> dict[str, bytes]:
    """Sound JPEGs of every kind."""
    image = photo()
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "plain": encoded(image, "JPEG", quality=90),
        "progressive": encoded(image, "JPEG", quality=90, progressive=True),
        "restarts": encoded(image, "JPEG", quality=90, restart_marker_blocks=3),
        "grey": encoded(image.convert("L"), "JPEG", quality=90),
        "cmyk": encoded(image.convert("CMYK"), "JPEG", quality=90),
        "optimised": encoded(image, "JPEG", optimize=True, subsampling=0),
    } | {
        "one_pixel": encoded(image.resize((1, 1)), "JPEG"),
        "exif": encoded(image, "JPEG", exif=exif),
        "flat": encoded(Image.new("RGB", (300, 200), (10, 20, 30)), "JPEG", optimize=True),
        "zeros_behind": encoded(image, "JPEG") + bytes(1000),
        "text_behind": encoded(image, "JPEG") + b"trailing text " * 50,
        "jpeg_behind": encoded(image, "JPEG") + encoded(image.resize((32, 24)), "JPEG"),
        "old_jfif": encoded(image, "JPEG").replace(b"JFIF\0\x01", b"JFIF\0\x02", 1),
    }


def damaged(data: bytes, how: str, seed: int) -> bytes:
    """A JPEG with 400 bytes of its last scan zeroed or made noise, or half of it with an end marker."""
    random = np.random.default_rng(seed)
    first = data.rindex(b"\xff\xda") + 14
    at = int(random.integers(first, max(first + 1, len(data) - 600)))
    if how == "half":
        return data[: (first + len(data)) // 2] + b"\xff\xd9"
    filling = bytes(400) if how == "zeroed" else random.integers(0, 256, 400).astype(np.uint8).tobytes()
    return data[:at] + filling[: len(data) - 2 - at] + data[at + 400 :][-max(2, len(data) - at - 400) :]


def test_verify_deep_passes_sound_images_of_every_kind(tmp_path, call):
    for name, data in kinds_of_jpeg().items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
    write_all(tmp_path / "other types", READ | DEEP)
    count = len(kinds_of_jpeg()) + len(READ) + len(DEEP)
    code, out, error = call("data", "verify", "--deep", tmp_path)
    assert (code, out, error) == (0, f"{count} images, 0 bad\n", "")


@pytest.mark.parametrize("how", ["zeroed", "noise", "half"])
def test_verify_deep_names_jpegs_that_libjpeg_decodes_with_a_warning(tmp_path, call, how):
    expected = []
    for name, data in kinds_of_jpeg().items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
        if name in ("plain", "progressive", "restarts", "grey", "cmyk", "optimised"):
            (tmp_path / f"{name}_damaged.jpg").write_bytes(damaged(data, how, seed=1))
            expected.append(f"{name}_damaged.jpg")
    shallow = call("data", "verify", tmp_path)
    assert shallow[0] == 0
    assert "0 bad (headers and ends only; --deep decodes)" in shallow[1]
    code, out, error = call("data", "verify", "--deep", tmp_path)
    lines = out.splitlines()
    assert code == 1, error
    assert sorted(line.partition(": ")[0] for line in lines[:-1]) == sorted(expected)
    assert all("Corrupt JPEG data" in line or "marker" in line for line in lines[:-1])
    assert lines[-1] == f"{len(kinds_of_jpeg()) + len(expected)} images, {len(expected)} bad"


def test_verify_deep_checks_checksums_and_streams_of_other_types(tmp_path, call):
    write_all(tmp_path, {"sound.png": READ["photo.png"], "sound.tiff": READ["lzw.tiff"]})
    png = READ["photo.png"]()
    at = png.index(b"IDAT") + 300
    (tmp_path / "bit.png").write_bytes(png[:at] + bytes([png[at] ^ 1]) + png[at + 1 :])
    text = b"tEXt" + b"Comment\0sound"
    chunk = struct.pack(">I", len(text) - 4) + text + (zlib.crc32(text) ^ 1).to_bytes(4, "big")
    (tmp_path / "comment.png").write_bytes(png[:33] + chunk + png[33:])
    for name, compression in (("lzw.tiff", "tiff_lzw"), ("deflate.tiff", "tiff_adobe_deflate"), ("jpeg.tiff", "jpeg")):
        data = bytearray(encoded(photo(), "TIFF", compression=compression))
        middle = len(data) // 2
        data[middle : middle + 300] = bytes(300)
        (tmp_path / name).write_bytes(data)
    code, out, _ = call("data", "verify", "--deep", tmp_path)
    names = [line.partition(": ")[0] for line in out.splitlines()[:-1]]
    assert (code, sorted(names)) == (1, ["bit.png", "comment.png", "deflate.tiff", "jpeg.tiff", "lzw.tiff"]), out
    assert "bit.png: damaged PNG (checksum of its chunk IDAT)" in out
    assert "comment.png: damaged PNG (checksum of its chunk tEXt)" in out
    assert out.splitlines()[-1] == "7 images, 5 bad"


def test_verify_deep_uses_several_processes_and_finds_damage_in_shards(tmp_path, mae_scale, call):
    images = tmp_path / "images"
    images.mkdir()
    sound = kinds_of_jpeg()["plain"]
    for number in range(320):
        (images / f"{number:03d}.jpg").write_bytes(sound if number % 100 != 50 else damaged(sound, "half", number))
    assert call("data", "pack", images, tmp_path / "shards")[0] == 0
    for folder, name in ((images, "{}.jpg"), (tmp_path / "shards", "000000.tar/{}.jpg")):
        done = mae_scale("data", "verify", "--deep", folder)
        assert done.returncode == 1, done.stdout
        bad = [line.partition(": ")[0] for line in done.stdout.splitlines()[:-1]]
        assert bad == [name.format(number) for number in ("050", "150", "250")]
        assert "320 images, 3 bad" in done.stdout
        assert done.stderr == ""  # libjpeg's own lines have no name


def test_a_training_names_a_damaged_image_once_and_goes_on(tmp_path, mae_scale):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        data = encoded(photo().rotate(number), "JPEG", quality=90)
        (images / f"{number:02d}.jpg").write_bytes(damaged(data, "half", number) if number in (3, 8) else data)
    arguments = [*TINY, f"data.root={images}", "data.global_batch=6", "model.image_size=32", "tracking.uri=off"]
    arguments += ["schedule.epochs=8", "data.augmentation=none"]  # whole images: the damage is met in every epoch
    done = mae_scale("pretrain", "demo", "--out", tmp_path / "run", *arguments)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    named = re.findall(r"damaged image \S*/(\d\d\.jpg): (Corrupt JPEG data: [^;]*)", " ".join(said.split()))
    assert sorted(named) == [(f"{n}.jpg", "Corrupt JPEG data: premature end of data segment") for n in ("03", "08")]
    assert said.count("Corrupt JPEG data") == 2
    assert len(losses(tmp_path / "run")) == 16


def test_what_else_is_written_to_the_standard_error_while_images_are_decoded_comes_through(
    tmp_path, capfd, monkeypatch
):
    """C's stderr is another file meanwhile: a library's lines are passed on, Python's go straight through."""
    import ctypes

    from data_pipeline.augment.kinds import augmentation
    from data_pipeline.byte_reader import ByteReader
    from data_pipeline.index_build import build_index
    from data_pipeline.plan import plan_batch

    (tmp_path / "half.jpg").write_bytes(damaged(kinds_of_jpeg()["plain"], "half", 0))
    index = build_index(tmp_path, progress=False)
    kind = augmentation("none")
    plan = plan_batch(index, kind, seed=0, number=0, global_batch=1, sample_ids=np.array([0]), image_size=32)
    decoder = Decoder(Decoding(kind, 32, device="cpu"), 1)
    libc = ctypes.CDLL(None)
    libc.fputs.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    build = decoder._build

    def speaking():
        pipeline = build()
        run = pipeline.run

        def speak_and_run(**inputs):
            libc.fputs(b"a library speaks\n", ctypes.c_void_p.in_dll(libc, "stderr").value)
            os.write(2, b"python speaks\n")
            return run(**inputs)

        pipeline.run = speak_and_run
        return pipeline

    monkeypatch.setattr(decoder, "_build", speaking)
    decoder.decode([ByteReader(index).read(0)], plan)
    assert decoder.damage == ["Corrupt JPEG data: premature end of data segment"]
    assert capfd.readouterr().err == "python speaks\na library speaks\n"
    libc.fputs(b"afterwards\n", ctypes.c_void_p.in_dll(libc, "stderr").value)
    assert capfd.readouterr().err == "afterwards\n"


@pytest.fixture(autouse=True)
def nothing_named_yet():
    """Each test is a process of its own as to what has been named."""
    _damaged.clear()
