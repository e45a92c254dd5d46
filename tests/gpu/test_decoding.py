"""Decoding on the GPU ("mixed") gives the CPU's crops, flips and, but for JPEG rounding, the CPU's pixels."""

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")
pytest.importorskip("sklearn")

from data_pipeline import dali_graph
from data_pipeline.augment.kinds import SecondView, augmentation
from data_pipeline.batch_layout import batch_layout
from data_pipeline.batch_order import TrainingOrder
from data_pipeline.byte_reader import ByteReader
from data_pipeline.dali_graph import Decoding, decoding_device
from data_pipeline.decoder import Decoder
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from data_pipeline.plan import plan_batch
from data_pipeline.samples import write_photos

pytestmark = pytest.mark.timeout(300)

COUNT = 16
KINDS = ("random_resized_crop", "fixed_crop", "evaluation", "random_resized_crop_color_jitter", "moco_v3")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    from PIL import Image

    root = write_photos(tmp_path_factory.mktemp("photos") / "photos", COUNT)
    photo = Image.open(root / "000000.jpg")
    photo.convert("L").save(root / "grey.jpg", quality=95)
    photo.resize((120, 333)).save(root / "progressive.jpg", progressive=True)
    photo.resize((1300, 1000)).save(root / "large.jpg", quality=90)  # above hybrid_huffman_threshold
    photo.save(root / "444.jpg", quality=90, subsampling=0)
    photo.save(root / "422.jpg", quality=90, subsampling=1)
    return build_index(root, progress=False)


def levels(images: torch.Tensor) -> np.ndarray:
    """Normalisation undone: float64 [n, 3, S, S] of 255."""
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.cpu().double().numpy() * std + mean) * 255


def decoded(index, kind, device, size=224, micro_batch=None, order=1, second=None):
    """Pixels of every image, decoded `micro_batch` at a time (all), in the order of the index or backwards (-1); of
    their second view where one is given."""
    kind = augmentation(kind)
    ids = np.arange(len(index))
    plan = plan_batch(
        index, kind, seed=0, number=1, global_batch=len(index), sample_ids=ids, image_size=size, second=second
    )
    reader = ByteReader(index)
    micro_batch = micro_batch or len(index)
    decoder = Decoder(Decoding(kind, size, device=device, device_id=0, second=second), micro_batch)
    found = []
    for first in range(0, len(index), micro_batch):
        rows = ids[::order][first : first + micro_batch]
        images = decoder.decode([reader.read(i) for i in rows], plan[rows])[-1]
        images = images.as_cpu() if device == "mixed" else images
        found.append(levels(torch.from_numpy(np.array(images.as_array()))))
    return np.concatenate(found)[::order]


def close(ours, theirs):
    """Every image by itself: the two JPEG decoders round and up-sample colour in their own ways."""
    error = np.abs(ours - theirs)
    assert error.mean(axis=(1, 2, 3)).max() < 2
    assert np.quantile(error, 0.999) < 30


def test_auto_decodes_on_the_gpu():
    assert decoding_device("auto") == "mixed"
    assert decoding_device("gpu") == "mixed"


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_the_cpus(index, kind):
    on_gpu, on_cpu = decoded(index, kind, "mixed"), decoded(index, kind, "cpu")
    close(on_gpu, on_cpu)
    assert np.abs(on_gpu - on_gpu[::-1]).mean() > 10  # different images do differ


VIEWS = [
    ("random_resized_crop", SecondView(None, 112)),
    ("random_resized_crop", SecondView(augmentation("random_resized_crop"), 224)),
    ("moco_v3", SecondView(augmentation("moco_v3_second"), 224)),
]


@pytest.mark.parametrize(("kind", "second"), VIEWS)
def test_second_views_are_the_cpus(index, kind, second):
    close(decoded(index, kind, "mixed", second=second), decoded(index, kind, "cpu", second=second))


@pytest.mark.parametrize("fancy", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_depend_neither_on_the_micro_batch_nor_on_the_images_beside(index, kind, fancy, monkeypatch):
    monkeypatch.setitem(dali_graph.MIXED_DECODER, "jpeg_fancy_upsampling", fancy)
    whole = decoded(index, kind, "mixed", micro_batch=16)
    for micro_batch in (1, 2, 8):
        assert np.array_equal(decoded(index, kind, "mixed", micro_batch=micro_batch), whole), micro_batch
    assert np.array_equal(decoded(index, kind, "mixed", micro_batch=16, order=-1), whole)


def test_fancy_up_sampling_brings_420_images_closer_to_the_cpus(index, monkeypatch):
    """An expectation that no GPU has confirmed yet: within 0.5 of 255 on average, and closer than without."""
    photos = index.take(np.array([i for i in range(len(index)) if index.name(i)[0] == "0"]))  # 4:2:0
    assert len(photos) == COUNT
    on_cpu = decoded(photos, "random_resized_crop", "cpu")
    error = {}
    for fancy in (True, False):
        monkeypatch.setitem(dali_graph.MIXED_DECODER, "jpeg_fancy_upsampling", fancy)
        error[fancy] = np.abs(decoded(photos, "random_resized_crop", "mixed") - on_cpu).mean(axis=(1, 2, 3))
    assert error[True].max() < 0.5
    assert (error[True] < error[False]).all()


def test_rand_augment_runs_on_the_gpu_and_does_there_what_it_does_on_the_cpu(index):
    """Most images: where an operation has a threshold, the decoders' rounding can move a pixel by any amount."""
    error = np.abs(decoded(index, "rand_augment", "mixed") - decoded(index, "rand_augment", "cpu"))
    assert np.median(error.mean(axis=(1, 2, 3))) < 3


def batches(index, device, micro_batch=8, steps=3, start=0):
    order = TrainingOrder(batch_layout(8, micro_batch=micro_batch), start_step=start, stop_step=steps)
    with ImageLoader(index, order, Decoding(augmentation("random_resized_crop"), 96, device=device)) as loader:
        return [(b.images.clone(), b.labels.clone(), b.sample_ids.copy(), b.number) for b in loader]


def test_batches_lie_on_the_gpu_and_are_the_cpus(index):
    on_gpu, on_cpu = batches(index, "gpu"), batches(index, "cpu")
    assert len(on_gpu) == len(on_cpu) == 3
    for (images, labels, ids, step), (cpu_images, _, cpu_ids, cpu_step) in zip(on_gpu, on_cpu, strict=True):
        assert images.is_cuda
        assert labels.is_cuda
        assert images.dtype == torch.float32
        assert np.array_equal(ids, cpu_ids)
        assert step == cpu_step
        close(levels(images), levels(cpu_images))


def test_a_global_batch_is_the_same_for_any_micro_batch_and_from_the_middle(index):
    whole = torch.cat([images for images, *_ in batches(index, "gpu")])
    assert torch.equal(whole, torch.cat([images for images, *_ in batches(index, "gpu", micro_batch=2)]))
    assert torch.equal(whole[16:], batches(index, "gpu", start=2)[0][0])


def test_batches_stay_whole_while_more_are_decoded(index):
    """The loader works ahead on streams of its own: what was handed out may not change under the consumer."""
    order = TrainingOrder(batch_layout(8), stop_step=20)
    with ImageLoader(index, order, Decoding(augmentation("random_resized_crop"), 96, device="gpu")) as loader:
        kept = [batch.images for batch in loader]
    expected = [images for images, *_ in batches(index, "gpu", steps=20)]
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


@pytest.mark.parametrize("exif_orientation", [False, True])
def test_other_image_types_and_turned_images_are_the_cpus(tmp_path, exif_orientation):
    """TIFF and JPEG 2000 have decoders of their own on a GPU. Expected, not yet seen: no GPU has run this."""
    from PIL import Image

    from tests.image_types import DEEP, READ, photo, write_all

    write_all(tmp_path, READ | DEEP)
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        photo().save(tmp_path / f"turned{orientation}.jpg", exif=exif, quality=95)
    index = build_index(tmp_path, progress=False)
    index = index.turned() if exif_orientation else index
    kind, ids = augmentation("random_resized_crop"), np.arange(len(index))
    plan = plan_batch(index, kind, seed=0, number=1, global_batch=len(ids), sample_ids=ids, image_size=64)
    found = []
    for device in ("cpu", "mixed"):
        decoding = Decoding(kind, 64, device=device, device_id=0, exif_orientation=exif_orientation)
        decoder = Decoder(decoding, len(ids))
        (images,) = decoder.decode([ByteReader(index).read(i) for i in ids], plan)
        images = images.as_cpu() if device == "mixed" else images
        found.append(levels(torch.from_numpy(np.array(images.as_array()))))
    close(*found)
