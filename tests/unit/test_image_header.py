"""Sizes and orientation from the headers of every image type; files that are cut, damaged or refused."""

import contextlib
import io
import struct

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import BadImage
from data_pipeline.image_header.read import check_whole, read_header
from tests.image_types import DEEP, READ, REFUSED, photo
from tests.pictures import small


def header_of(data: bytes):
    return read_header(lambda at, n: data[at : at + n], len(data))


@pytest.mark.parametrize("name", [*READ, *DEEP])
def test_a_header_gives_the_size_that_pillow_gives(name):
    data = (READ | DEEP)[name]()
    width, height = Image.open(io.BytesIO(data)).size
    assert header_of(data) == (height, width, 1)
    check_whole(data)


@pytest.mark.parametrize("name", sorted({*READ, *DEEP} - {"pages.tiff"}))  # of which the first page is used
def test_an_image_cut_anywhere_is_refused(name):
    data = (READ | DEEP)[name]()
    for end in np.linspace(0, len(data) - 3, 40).astype(int).tolist():
        with pytest.raises(BadImage):
            header_of(data[:end])
        if end:
            with pytest.raises(BadImage):
                check_whole(data[:end])


@pytest.mark.parametrize("name", REFUSED)
def test_what_dali_does_not_decode_as_it_is_stored_is_refused_with_the_reason(name):
    make, reason = REFUSED[name]
    with pytest.raises(BadImage, match=reason):
        header_of(make())


def test_damaged_headers_are_a_size_or_a_reason_and_never_another_error():
    random = np.random.default_rng(0)
    for make in (READ | DEEP).values():
        data = make()
        for _ in range(60):
            damaged = bytearray(data)
            for at in random.integers(0, min(len(data), 400), 4):
                damaged[at] = random.integers(256)
            with contextlib.suppress(BadImage):
                height, width, orientation = header_of(bytes(damaged))
                assert min(height, width) > 0
                assert orientation in range(1, 9)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_jpeg_or_png_cut_at_any_byte_is_refused(kind):
    data = small(kind=kind)
    for length in [*range(0, 700), *range(700, len(data), 97), len(data) - 1]:
        with pytest.raises(BadImage):
            read_header(lambda at, n, end=length: data[at : min(at + n, end)], length)
    assert read_header(lambda at, n: data[at : at + n], len(data))[:2] == (40, 60)


def test_padding_behind_the_end_marker_is_accepted():
    data = small() + bytes(300)
    assert read_header(lambda at, n: data[at : at + n], len(data))[:2] == (40, 60)


def block(orientation: int, order: str = "<", first: int = 8) -> bytes:
    """An EXIF block with an orientation in a directory at byte `first`."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x112, 3, 1, orientation, 0)
    return start + struct.pack(order + "I", first) + bytes(first - 8) + struct.pack(order + "H", 1) + entry + bytes(4)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("first", [8, 9000])
def test_the_orientation_is_found_wherever_it_stands(order, first):
    jpeg = READ["photo.jpeg"]()
    payload = b"Exif\0\0" + block(6, order, first)
    segment = b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload
    for at in (2, 20):  # before and behind the JFIF segment
        assert header_of(jpeg[:at] + segment + jpeg[at:]) == (64, 96, 6)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("WEBP", {"quality": 80})):
        file = io.BytesIO()
        photo().save(file, kind, exif=block(6, order, first), **options)
        assert header_of(file.getvalue()) == (64, 96, 6), kind


def test_an_orientation_behind_the_pixels_of_a_png_is_found():
    file = io.BytesIO()
    photo().save(file, "PNG", exif=block(8))
    data = file.getvalue()
    at = data.index(b"eXIf") - 4
    end = at + 12 + len(block(8))
    late = data.index(b"IEND") - 4
    moved = data[:at] + data[end:late] + data[at:end] + data[late:]
    assert Image.open(io.BytesIO(moved)).getexif()[0x112] == 8
    assert header_of(moved) == (64, 96, 8)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(orientation):
    file = io.BytesIO()
    photo().save(file, "JPEG", exif=b"Exif\0\0" + block(orientation))
    assert header_of(file.getvalue()) == (64, 96, 1)
