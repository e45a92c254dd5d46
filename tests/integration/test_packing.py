"""`mae-scale data pack`: what is in the shards trains as the folder does, to the last bit."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline import packing
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import TrainingOrder
from data_pipeline.index import load_index
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from tests.loaders import on_cpu
from tests.pictures import picture, put
from tests.tiny import arguments, losses

LAYOUTS = {
    "classes": [f"{name}/{number:02d}.JPEG" for name in ("ant", "bee", "cat") for number in range(10)],
    "nested classes": [f"{name}/{number}.jpg" for name in ("Aves/3100", "Aves/31", "Fungi/56") for number in range(10)],
    "flat": [f"{number}.jpg" for number in range(30)],
    "names that WebDataset reads in another way": [
        *(f"a/{number}.jpg" for number in range(20)),
        *("a/1.png", "a/1.jpeg", "a/1.JPG", "a/1.2.jpg", "a/1%2E2.jpg", "a/v1.0/x.jpg", "b/é ü.jpg", "b/.x/hidden.jpg"),
        *(
            "b/" + "long" * 40 + ".jpg",
            "b/" + "/".join(["deep"] * 30) + "/x.jpg",
            "b-/x.jpg",
            "c.d/x.y.jpg",
            "root.jpg",
            os.fsdecode(b"not UTF-8 \xff.jpg"),
        ),
    ],
}


@pytest.fixture(params=LAYOUTS)
def folder(request, tmp_path) -> Path:
    root = tmp_path / "images"
    for number, name in enumerate(LAYOUTS[request.param]):
        put(root, name, picture(number, 200 + number, kind="PNG" if name.endswith("png") else "JPEG"))
    if request.param != "flat":
        (root / "zebra").mkdir()  # a class without images
    return root


def batches(index) -> list[tuple]:
    order = TrainingOrder(batch_layout(10, micro_batch=5), seed=3, stop_step=5)
    with ImageLoader(index, order, on_cpu(kind="random_resized_crop_color_jitter")) as loader:
        return [(batch.images, batch.labels, batch.sample_ids.tolist()) for batch in loader]


def test_batches_from_the_shards_are_the_folders_to_the_last_bit(folder, tmp_path, call):
    code, out, error = call("data", "pack", folder, tmp_path / "shards", "--shard-mib", 1, "--workers", 1)
    assert code == 0, error
    before, after = build_index(folder, progress=False), load_index(tmp_path / "shards" / ".mae_scale_index.npz")
    assert out.splitlines() == [after.summary(), *after.remarks.sentences()]
    assert len(after.shard_names) > 1
    assert (after.classes, len(after)) == (before.classes, len(before))
    for column in ("label", "height", "width", "num_bytes"):
        assert np.array_equal(getattr(after, column), getattr(before, column)), column
    for ours, theirs in zip(batches(after), batches(before), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert ours[2] == theirs[2]


def test_keys_are_unique_and_end_at_the_first_dot(folder, tmp_path, call):
    """As any WebDataset reader groups members: all up to the first dot of the file's name."""
    assert call("data", "pack", folder, tmp_path / "shards", "--workers", 1)[0] == 0
    with tarfile.open(tmp_path / "shards" / "000000.tar") as archive:
        names = archive.getnames()
    samples = [name.rpartition("/")[0] + "/" + name.rpartition("/")[2].partition(".")[0] for name in names]
    images = [k for k, name in zip(samples, names, strict=True) if not name.endswith(".cls")]
    assert len(images) == len(set(images)) == len(build_index(folder, progress=False))
    labels = [k for k, name in zip(samples, names, strict=True) if name.endswith(".cls")]
    assert len(labels) == len(set(labels))
    assert set(labels) <= set(images)


def test_a_training_from_shards_has_the_folders_losses_to_the_last_bit(digits, tmp_path, mae_scale):
    assert mae_scale("data", "pack", digits / "train", tmp_path / "shards", "--shard-mib", 1).returncode == 0
    found = []
    for root in (digits / "train", tmp_path / "shards"):
        out = tmp_path / f"run{len(found)}"
        more = [f"data.root={root}", "schedule.stop_after_steps=6"]
        done = mae_scale("pretrain", "demo", "--out", out, "--tracking-uri", "off", *arguments(digits, *more))
        assert done.returncode == 0, done.stderr
        found.append(losses(out))
    assert len(found[0]) == 6
    assert found[0] == found[1]


def test_images_larger_than_the_shorter_side_are_made_smaller_and_the_others_keep_their_bytes(tmp_path, call):
    root = tmp_path / "images"
    exif = Image.Exif()
    exif[0x0112] = 6
    put(root, "large.jpg", picture(1, 600, 903, exif=exif, comment=b"c", icc_profile=b"p" * 100, subsampling=0))
    put(root, "420.jpg", picture(2, 600, 450, subsampling=2))
    put(root, "grey.jpg", picture(3, 600, 450, mode="L"))
    put(root, "cmyk.jpg", picture(4, 450, 600, mode="CMYK"))
    put(root, "alpha.png", picture(5, 450, 600, mode="RGBA", kind="PNG"))
    put(root, "palette.png", picture(5, 450, 600, mode="P", kind="PNG"))
    deep = io.BytesIO()
    Image.fromarray(np.full((450, 600), 40000, np.uint16)).save(deep, "PNG")
    put(root, "sixteen.png", deep.getvalue())
    put(root, "just.jpg", picture(6, 300, 450))
    put(root, "small.png", picture(7, 299, 5000, kind="PNG"))
    assert call("data", "pack", root, tmp_path / "a", "--shorter-side", 300, "--workers", 1)[0] == 0
    with tarfile.open(tmp_path / "a" / "000000.tar") as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}
    expected = [path.stem for path in sorted(root.glob("[!.]*"))]
    assert [name.rpartition(".")[0].replace("%png", "") for name in found] == expected
    for name in ("just.jpg", "small%png.png", "sixteen%png.png"):
        assert found[name] == (root / name.replace("%png", "")).read_bytes()
    assert {name for name in found if name.endswith("png")} == {"small%png.png", "sixteen%png.png"}
    sizes = {"large.jpg": (452, 300), "420.jpg": (300, 400), "grey.jpg": (300, 400), "cmyk.jpg": (400, 300)}
    sizes |= {"alpha%png.jpg": (400, 300), "palette%png.jpg": (400, 300)}
    modes = {name: "L" if name == "grey.jpg" else "RGB" for name in sizes}
    for name, size in sizes.items():
        image = Image.open(io.BytesIO(found[name]))
        assert (image.format, image.size, image.mode) == ("JPEG", size, modes[name]), name
        assert dict(image.getexif()) == ({0x0112: 6} if name == "large.jpg" else {})  # its orientation alone
        assert not {"icc_profile", "comment"} & set(image.info)
        theirs = Image.open(root / name.replace("%png.jpg", ".png")).convert("RGB")
        theirs = theirs.resize(size, Image.Resampling.BICUBIC)
        error = np.abs(np.asarray(image.convert("RGB"), float) - np.asarray(theirs, float)).mean()
        assert error < 12, (name, error)  # noise is what JPEG is worst at
        if image.mode == "RGB":
            assert image.layer[0][1:3] == ((2, 2) if name == "420.jpg" else (1, 1)), name  # colour sub-sampling
    index = load_index(tmp_path / "a" / ".mae_scale_index.npz")
    assert np.minimum(index.height, index.width).max() == 450  # the one of 16 bits
    code, _, error = call("data", "pack", root, tmp_path / "a", "--shorter-side", 300, "--quality", 80)
    assert code == 2
    assert "other options (quality 92 -> 80)" in error
    assert call("data", "pack", root, tmp_path / "b", "--shorter-side", 300, "--quality", 80)[0] == 0
    assert (tmp_path / "b" / "000000.tar").stat().st_size < (tmp_path / "a" / "000000.tar").stat().st_size


def test_unreadable_images_are_left_out_and_named(tmp_path, call):
    root = tmp_path / "images"
    for number in range(3):
        put(root, f"{number}.jpg", picture(number))
    put(root, "cut.jpg", picture(9)[:-400])
    garbled = bytearray(picture(8))
    at = garbled.index(b"\xff\xc4")
    garbled[at + 5 : at + 21] = b"\xff" * 16
    put(root, "garbled.jpg", bytes(garbled))
    code, out, _ = call("data", "pack", root, tmp_path / "same", "--workers", 1)
    assert code == 0
    assert out.startswith("cut.jpg: truncated JPEG")
    assert "4 images" in out
    for _ in range(2):  # and named again by a second call
        code, out, _ = call("data", "pack", root, tmp_path / "small", "--shorter-side", 100, "--workers", 1)
        assert code == 0
        assert "cut.jpg: truncated JPEG" in out
        assert "garbled.jpg: cannot be decoded" in out
        assert out.endswith("3 images, 0.03 MiB, 1 shards, 2 unreadable images left out\n")


def test_an_image_that_changes_while_it_is_packed_stops_with_its_name(tmp_path, call, monkeypatch):
    root = tmp_path / "images"
    for number in range(3):
        put(root, f"{number}.jpg", picture(number))

    def changed(*arguments, **options):
        index = build_index(*arguments, progress=False)
        put(root, "1.jpg", picture(1)[:-100])
        return index

    monkeypatch.setattr(packing, "open_index", changed)
    code, _, error = call("data", "pack", root, tmp_path / "shards", "--workers", 1)
    assert code == 1
    assert "1.jpg: changed since it was indexed" in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "shards").glob("*.tar"))
