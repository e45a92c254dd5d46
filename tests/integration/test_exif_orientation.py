"""EXIF orientation: images are taken as stored, or with data.exif_orientation as Pillow's exif_transpose turns them."""

import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.augment.kinds import augmentation
from data_pipeline.batch_order import EvaluationOrder
from data_pipeline.byte_reader import ByteReader
from data_pipeline.dali_graph import Decoding
from data_pipeline.decoder import Decoder
from data_pipeline.errors import UsageError
from data_pipeline.index import load_index
from data_pipeline.index_build import build_index, open_index
from data_pipeline.loader import ImageLoader
from data_pipeline.plan import plan_batch
from tests.image_types import photo
from tests.integration.test_image_types import pixels
from tests.loaders import on_cpu
from tests.tiny import TINY, losses

SIDE = 48
WHOLE_AND_TURNED = on_cpu(SIDE, "evaluation_whole", exif_orientation=True)
TYPES = {
    "jpg": ("JPEG", {"quality": 95}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "tif": ("TIFF", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The photograph with each orientation, in four types; 96 x 64 pixels as stored."""
    root = tmp_path_factory.mktemp("turned") / "images"
    root.mkdir()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for suffix, (kind, options) in TYPES.items():
            options = options | ({"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif})
            photo().save(root / f"{orientation}.{suffix}", kind, **options)
    return root


def turned(path) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def stored(path) -> Image.Image:
    """The pixels as they lie in the file; Pillow turns TIFFs by itself."""
    return Image.open(path).convert("RGB") if path.suffix != ".tif" else photo()


@pytest.mark.parametrize("exif_orientation", [False, True])
def test_crops_are_pillows_of_the_image_turned_or_as_stored(folder, exif_orientation):
    index = build_index(folder, progress=False)
    assert index.orientation.tolist() == [int(index.name(i)[0]) for i in range(len(index))]
    wanted = turned if exif_orientation else stored
    index = index.turned() if exif_orientation else index
    for i in range(len(index)):
        assert (index.width[i], index.height[i]) == wanted(index.path(i)).size, index.name(i)
    kind = augmentation("random_resized_crop", flip=0.0)
    plan = plan_batch(
        *(index, kind), seed=0, number=0, global_batch=len(index), sample_ids=np.arange(len(index)), image_size=SIDE
    )
    decoder = Decoder(Decoding(kind, SIDE, device="cpu", exif_orientation=exif_orientation), len(index))
    reader = ByteReader(index)
    ours = pixels(decoder.decode([reader.read(i) for i in range(len(index))], plan)[0].as_array())
    for i, image in enumerate(ours):
        y, x, height, width = plan.crops[i].tolist()
        theirs = (
            wanted(index.path(i)).crop((x, y, x + width, y + height)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        )
        assert np.abs(image - np.asarray(theirs)).mean() < 0.5, index.name(i)
        assert np.abs(image - np.asarray(theirs)).max() < 20, index.name(i)


def test_shards_and_evaluation_turn_images_as_the_folder_does(folder, tmp_path, call):
    assert call("data", "pack", folder, tmp_path / "shards")[0] == 0
    batches = []
    for root in (folder, tmp_path / "shards"):
        with ImageLoader(build_index(root, progress=False), EvaluationOrder(32), WHOLE_AND_TURNED) as loader:
            batches.append(next(iter(loader)).images.numpy())
    assert np.array_equal(*batches)
    index = build_index(folder, progress=False)
    for i, image in enumerate(pixels(batches[0])):
        theirs = turned(index.path(i)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        assert np.abs(image - np.asarray(theirs)).mean() < 0.5, index.name(i)


def test_images_made_smaller_keep_their_orientation(folder, tmp_path, call):
    code, _, error = call("data", "pack", folder, tmp_path / "shards", "--shorter-side", 40)
    assert code == 0, error
    before, after = build_index(folder, progress=False), build_index(tmp_path / "shards", progress=False)
    assert after.orientation.tolist() == before.orientation.tolist()
    names = [before.name(image) for image in range(len(before))]
    kept = [name.endswith(".tif") and name != "1.tif" for name in names]  # Pillow would turn it
    smaller = [(96, 64) if is_kept else (60, 40) for is_kept in kept]
    assert list(zip(after.width.tolist(), after.height.tolist(), strict=True)) == smaller


def test_the_digest_of_an_index_knows_nothing_of_orientation(folder, tmp_path):
    """Runs and caches of earlier versions go by it."""
    index = build_index(folder, progress=False)
    digest = index.digest()
    index.rows.columns["orientation"][:] = 1
    assert index.digest() == digest
    assert build_index(folder, progress=False).turned().digest() != digest


def without_orientation(file):
    """An index file as versions before wrote it."""
    with np.load(file) as index:
        columns = {name: index[name] for name in index.files if name != "orientation"}
    np.savez(file, **columns)


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_an_index_of_an_earlier_version_loads_and_is_refreshed(folder, tmp_path, call, kind):
    root = tmp_path / "data"
    root.symlink_to(folder)
    if kind == "shards":
        root = tmp_path / "shards"
        assert call("data", "pack", folder, root)[0] == 0
    index = open_index(root, tmp_path / "index.npz", progress=False)
    without_orientation(tmp_path / "index.npz")
    old = load_index(tmp_path / "index.npz", root)
    assert (old.digest(), len(old)) == (index.digest(), len(index))
    with pytest.raises(UsageError, match="older version"):
        ImageLoader(old, EvaluationOrder(8), WHOLE_AND_TURNED)
    fresh = open_index(root, tmp_path / "index.npz", progress=False)
    assert (fresh.rows.read, fresh.digest()) == (len(index), index.digest())
    assert fresh.orientation.tolist() == index.orientation.tolist()
    assert open_index(root, tmp_path / "index.npz", progress=False).rows.read == 0


def test_a_run_with_turned_images_is_another_run(folder, tmp_path, mae_scale, call):
    arguments = [*TINY, f"data.root={folder}", "data.global_batch=16", "model.image_size=32", "tracking.uri=off"]
    arguments += ["schedule.stop_after_steps=2", "data.augmentation=none"]
    done = mae_scale("pretrain", "demo", "--out", tmp_path / "run", *arguments, "data.exif_orientation=true")
    assert done.returncode == 0, done.stderr
    code, _, error = call("pretrain", "demo", "--out", tmp_path / "run", *arguments)
    assert code == 2
    assert "data.exif_orientation: True -> False" in " ".join(error.split())
    done = mae_scale("pretrain", "demo", "--out", tmp_path / "stored", *arguments)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") != losses(tmp_path / "stored")


def test_files_with_orientations_that_decoders_read_in_their_own_way_are_cut_where_the_index_says(tmp_path):
    """Whatever DALI makes of odd EXIF blocks, the index expects the same size."""
    file = tmp_path / "0.jpg"
    photo().save(file, quality=95)
    jpeg = file.read_bytes()
    for number, (order, kind, count, orientation) in enumerate(
        [("<", 3, 1, 6), (">", 3, 1, 6), ("<", 4, 1, 6), (">", 4, 1, 6), ("<", 3, 0, 6), ("<", 3, 2, 8), ("<", 1, 1, 5)]
    ):
        value = struct.pack(order + ("H" if kind == 3 else "I" if kind == 4 else "B"), orientation).ljust(4, b"\0")
        start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
        block = start + struct.pack(order + "HHHI", 1, 0x112, kind, count) + value + bytes(4)
        segment = b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block
        (tmp_path / f"{number + 1}.jpg").write_bytes(jpeg[:2] + segment + jpeg[2:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = build_index(tmp_path, progress=False)
        with ImageLoader(index, EvaluationOrder(8), WHOLE_AND_TURNED) as loader:
            assert next(iter(loader)).valid.all()
            assert not loader.bad_images.found
