"""WebP, BMP, TIFF, JPEG 2000 and PNM beside JPEG and PNG: found, decoded as Pillow does; what is left out is said."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import EvaluationOrder, TrainingOrder
from data_pipeline.cache import ImageCache
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from tests.image_types import DEEP, READ, REFUSED, encoded, photo, sixteen_bits, write_all
from tests.loaders import on_cpu
from tests.tiny import TINY, losses

SIDE = 64


def pixels(images) -> np.ndarray:
    """Normalisation undone: float64 [n, S, S, 3] of 255."""
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((np.asarray(images, np.float64) * std + mean) * 255).transpose(0, 2, 3, 1)


def evaluated(root: Path) -> dict[str, np.ndarray]:
    """Every image of a folder or of shards by its file's name: the middle 64 x 64 pixels, as evaluation takes them."""
    index = build_index(root, progress=False)
    found = {}
    with ImageLoader(index, EvaluationOrder(8), on_cpu(SIDE, "evaluation_whole")) as loader:
        for batch in loader:
            for row in np.flatnonzero(batch.valid):
                found[Path(index.name(batch.sample_ids[row])).name] = pixels(batch.images[row : row + 1])[0]
        assert not loader.bad_images.found
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every type in two class folders."""
    root = tmp_path_factory.mktemp("types") / "images"
    half = len(READ) // 2
    write_all(root / "a", dict(list(READ.items())[:half]))
    write_all(root / "b", dict(list(READ.items())[half:]))
    return root


@pytest.fixture(scope="module")
def theirs(folder) -> dict[str, np.ndarray]:
    """The same by Pillow."""
    found = {}
    for path in folder.rglob("*.*"):
        image = Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        found[path.name] = np.asarray(image, np.float64)
    return found


def test_every_type_is_decoded_as_pillow_does(folder, theirs):
    ours = evaluated(folder)
    assert ours.keys() == theirs.keys() == READ.keys()
    for name, image in theirs.items():
        difference = np.abs(ours[name] - image)
        # A palette of a TIFF has 16 bits, of which Pillow takes the upper 8 and DALI the nearest value.
        assert difference.mean() < (0.8 if name == "palette.tiff" else 0.25), name
        assert difference.max() < 16, name


def test_shards_give_the_pixels_of_the_folder(folder, tmp_path, call):
    code, out, error = call("data", "pack", folder, tmp_path / "shards", "--workers", 1)
    assert (code, error) == (0, "")
    assert out.startswith(f"{len(READ)} images")
    ours, packed = evaluated(folder), evaluated(tmp_path / "shards")
    for name, image in ours.items():
        stem, _, suffix = name.rpartition(".")
        member = next(key for key in packed if key.startswith(stem) and key.endswith(suffix))
        assert np.array_equal(packed[member], image), name


def test_training_takes_every_type_from_the_cache_as_from_the_folder(folder, tmp_path):
    index = build_index(folder, progress=False)
    order = TrainingOrder(batch_layout(len(READ)), stop_step=1)  # one: a batch read ahead would find images of this one
    found = []
    for cache in (None, ImageCache(tmp_path / "cache", index), ImageCache(tmp_path / "cache", index)):
        with ImageLoader(index, order, on_cpu(SIDE), cache=cache) as loader:
            batches = list(loader)
            assert not loader.bad_images.found
        found.append((np.stack([batch.images.numpy() for batch in batches]), batches[0].cache_hits))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][0], found[2][0])
    assert [hits for _, hits in found] == [0, 0, len(READ)]


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    write_all(tmp_path, DEEP)
    expected = np.rint(np.asarray(sixteen_bits(), np.float64) / 257)
    grey = Image.fromarray(expected.astype(np.uint8)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    ours = evaluated(tmp_path)
    assert ours.keys() == DEEP.keys()
    for name, image in ours.items():
        assert np.abs(image - np.asarray(grey)).mean() < 0.8, name


def test_index_says_what_is_left_out_and_why(tmp_path, call):
    write_all(tmp_path / "data" / "a", {"photo.webp": READ["lossy.webp"], "photo.png": READ["photo.png"]})
    write_all(tmp_path / "data" / "b", {name: make for name, (make, _) in REFUSED.items()})
    for number, name in enumerate(("x.gif", "y.gif", "z.GIF", "x.avif", "list.txt", "notes.txt", "README")):
        (tmp_path / "data" / "ab"[number % 2] / name).write_bytes(b"GIF89a")
    code, out, error = call("data", "index", tmp_path / "data")
    assert code == 0, error
    summary, left_out, classes = out.splitlines()
    assert summary.startswith("2 images")
    assert f"{len(REFUSED)} unreadable files left out" in summary
    assert left_out == "left out: 3 .gif, 2 .txt, 1 .avif, 1 without a suffix"
    assert classes == "classes without an image, still counted: 1 (b)"
    assert call("data", "index", tmp_path / "data")[1] == out  # of the index that is there now
    code, out, _ = call("data", "verify", "--deep", tmp_path / "data")
    assert code == 1
    assert f"12 images, {len(REFUSED)} bad" in out
    for name, (_, reason) in REFUSED.items():
        assert any(line.startswith(f"b/{name}: ") and reason in line for line in out.splitlines()), name
    (tmp_path / "data" / "a" / "x.avif").unlink(missing_ok=True)
    (tmp_path / "data" / "b" / "x.avif").unlink(missing_ok=True)
    assert "avif" not in call("data", "index", tmp_path / "data")[1]


def test_shards_say_what_is_left_out_and_nothing_of_ordinary_companions(tmp_path, call):
    members = {"1.jpg": READ["photo.jpeg"](), "1.cls": b"0", "1.json": b"{}", "2.webp": READ["lossy.webp"]()}
    members |= {"2.txt": b"a text", "3.gif": b"GIF89a", "4.avif": b"", "5.seg.png": READ["photo.png"]()}
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("6.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "1.jpg"
        archive.addfile(link)
    (tmp_path / "0.idx").write_text("")
    code, out, error = call("data", "index", tmp_path)
    assert code == 0, error
    assert out.splitlines()[1:] == ["left out: 1 .avif, 1 .gif, 1 .seg.png, 1 links"]
    os.utime(tmp_path / "0.tar")
    assert call("data", "index", tmp_path)[1] == out


def test_links_are_followed_and_what_is_there_twice_is_said(tmp_path, call):
    data = tmp_path / "data"
    for folder in "ab":
        write_all(data / folder, {f"{folder}.png": lambda folder=folder: encoded(photo().rotate(ord(folder)), "PNG")})
    call("data", "index", data)
    plain = call("data", "index", data)[1]
    assert len(plain.splitlines()) == 1
    (data / "b" / "again").symlink_to(data / "a")
    os.link(data / "b" / "b.png", data / "b" / "hard.png")
    (data / "b" / "round").symlink_to(data)
    (data / "loop").symlink_to(data)
    (data / "b" / "self.png").symlink_to("self.png")
    code, out, error = call("data", "index", data)
    assert code == 0, error
    assert out.startswith("4 images")
    assert "1 unreadable" in out
    assert "links to a folder above themselves, not followed: 2 (b/round)" in out
    assert "images under a second name through links, used once per name: 2 (a/a.png and b/again/a.png" in out


def test_a_run_says_what_is_left_out_and_learns_from_every_type(folder, tmp_path, mae_scale):
    (folder / "a" / "film.gif").write_bytes(b"GIF89a")
    (folder / "empty").mkdir()
    arguments = [*TINY, f"data.root={folder}", "data.global_batch=15", "model.image_size=32", "tracking.uri=off"]
    done = mae_scale("pretrain", "demo", "--out", tmp_path / "run", "schedule.stop_after_steps=4", *arguments)
    assert done.returncode == 0, done.stderr
    assert "\nleft out: 1 .gif\n" in done.stdout
    assert "\nclasses without an image, still counted: 1 (empty)\n" in done.stdout
    assert len(losses(tmp_path / "run")) == 4
    assert "bad image" not in done.stdout + done.stderr
