"""What DALI's graph gives equals torchvision's transforms for the same boxes, factors and flips.

Tolerances are levels of 255. Inside, beside torchvision on float tensors, only the final rounding to a whole level is
left; along its border (as wide as the filter) DALI repeats the last pixels where torchvision weighs those that are
there. Pillow also rounds and clips between its two passes: single pixels at sharp edges differ by more.
"""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageOps

from data_pipeline import dali_graph
from data_pipeline.augment.kinds import Augmentation, augmentation
from data_pipeline.byte_reader import ByteReader
from data_pipeline.dali_graph import MIXED_DECODER, Decoding, decoding_device
from data_pipeline.decoder import Decoder
from data_pipeline.errors import BadImage, UsageError
from data_pipeline.image_size import height_and_width
from data_pipeline.index_build import build_index
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from data_pipeline.plan import plan_batch
from data_pipeline.samples import write_photos

COUNT = 8
BICUBIC = F.InterpolationMode.BICUBIC


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = write_photos(tmp_path_factory.mktemp("photos") / "photos", COUNT)
    photo = Image.open(root / "000000.jpg")
    photo.convert("L").save(root / "grey.jpg", quality=95)
    photo.convert("CMYK").save(root / "cmyk.jpg", quality=95)
    photo.resize((120, 333)).save(root / "progressive.jpg", progressive=True)
    photo.save(root / "photo.png")
    photo.convert("L").save(root / "grey.png")
    return build_index(root, progress=False)


def pixels(images) -> np.ndarray:
    """Normalisation undone: float64 [n, 3, H, W] of 255."""
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (np.asarray(images.as_array(), np.float64) * std + mean) * 255


def decoded(index, kind, size, device="cpu", seed=0):
    kind = augmentation(kind) if isinstance(kind, str) else kind
    plan = plan_batch(
        index,
        kind,
        seed=seed,
        number=1,
        global_batch=len(index),
        sample_ids=np.arange(len(index)),
        image_size=size,
    )
    reader = ByteReader(index)
    decoder = Decoder(Decoding(kind, size, device=device), len(index))
    return plan, pixels(decoder.decode([reader.read(i) for i in range(len(index))], plan)[0])


def originals(index) -> list[Image.Image]:
    return [Image.open(index.path(i)).convert("RGB") for i in range(len(index))]


def difference(ours: np.ndarray, theirs) -> tuple[float, float]:
    theirs = np.asarray(theirs, np.float64)
    theirs = theirs if theirs.shape[0] == 3 else theirs.transpose(2, 0, 1)
    return np.abs(ours - theirs).mean(), np.abs(ours - theirs).max()


@pytest.mark.parametrize("size", [224, 448, 32, (96, 224), (224, 64)])
def test_random_resized_crop_equals_torchvisions_for_the_same_box(index, size):
    plan, ours = decoded(index, "random_resized_crop", size)
    output = height_and_width(size)
    for i, image in enumerate(originals(index)):
        box = [int(v) for v in plan.crops[i]]
        flip = F.hflip if plan.flips[i] else lambda x: x
        mean, largest = difference(ours[i], flip(F.resized_crop(image, *box, output, BICUBIC)))
        assert mean < (0.25 if min(output) > 32 else 0.5), index.name(i)
        assert largest < 16, index.name(i)
        tensor = F.pil_to_tensor(image).float()
        tensor = F.resized_crop(tensor, *box, output, BICUBIC, antialias=True).clamp(0, 255)
        edges = (2 + 3 * side // cut for side, cut in zip(output, box[2:], strict=True))
        inside = (slice(None), *(slice(edge, -edge) for edge in edges))
        _, largest = difference(ours[i][inside], flip(tensor)[inside])
        assert largest < 0.6, index.name(i)
    assert 0 < plan.flips.sum() < len(plan)


@pytest.mark.parametrize("size", [224, 448, 30, (96, 224), (224, 64)])
@pytest.mark.parametrize("kind", ["evaluation", "none"])
def test_evaluation_crop_equals_torchvisions(index, kind, size):
    _, ours = decoded(index, kind, size)
    for i, image in enumerate(originals(index)):
        theirs = F.center_crop(resized(image, size), height_and_width(size))
        mean, largest = difference(ours[i], theirs)
        assert mean < 0.25, index.name(i)
        assert largest < 20, index.name(i)


def resized(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Return an image as torchvision's Resize makes it before a crop, of a side that it leaves room for."""
    if isinstance(size, int):
        return F.resize(image, int(size / 0.875), BICUBIC)
    height, width = (int(side / 0.875) for side in size)
    if height / image.height > width / image.width:
        return image.resize((int(image.width * height / image.height), height), Image.Resampling.BICUBIC)
    return image.resize((width, int(image.height * width / image.width)), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [224, 448, 30, (96, 224)])
def test_the_whole_image_is_resized_as_torchvision_does(index, size):
    _, ours = decoded(index, "evaluation_whole", size)
    for i, image in enumerate(originals(index)):
        mean, largest = difference(ours[i], F.resize(image, height_and_width(size), BICUBIC))
        assert mean < (0.25 if size != 30 else 0.5), index.name(i)
        assert largest < 16, index.name(i)


@pytest.mark.parametrize("size", [224, (96, 224)])
def test_fixed_crop_equals_torchvisions_for_the_same_offset(index, size):
    plan, ours = decoded(index, "fixed_crop", size)
    for i, image in enumerate(originals(index)):
        larger = resized(image, size)
        scale = larger.height / image.height, larger.width / image.width
        y, x = (round(float(plan.regions[i, k]) * scale[k]) for k in (0, 1))
        theirs = F.crop(larger, y, x, *height_and_width(size))
        mean, largest = difference(ours[i], F.hflip(theirs) if plan.flips[i] else theirs)
        assert mean < 0.25, index.name(i)
        assert largest < 20, index.name(i)


def test_colour_jitter_equals_torchvisions_for_the_same_factors_in_the_same_order(index):
    """Each of the three operations rounds: within 2 levels on average for all three."""
    jitter = Augmentation("j", "random_resized", jitter=(0.4, 0.4, 0.4, 0.0))
    plain = Augmentation("p", "random_resized")
    operations = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    changed = []
    for seed in range(3):
        plan, ours = decoded(index, jitter, 96, seed=seed)
        _, before = decoded(index, plain, 96, seed=seed)
        for i in range(len(index)):
            image = Image.fromarray(np.rint(before[i]).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
            theirs = image
            for operation in plan.jitter_order[i]:
                theirs = operations[operation](theirs, float(plan.jitter[i, operation]))
            mean, largest = difference(ours[i], theirs)
            changed.append(difference(ours[i], image)[0])
            assert mean < 2, (index.name(i), plan.jitter[i])
            assert largest < 6, (index.name(i), plan.jitter[i])
    assert np.median(changed) > 10


def test_an_image_turned_by_exif_is_cropped_as_stored(tmp_path, index):
    """As the index measured it and as torchvision reads it: EXIF is ignored everywhere."""
    photo = Image.open(index.path(0))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    photo.save(tmp_path / "plain.jpg", quality=95)
    assert ImageOps.exif_transpose(Image.open(tmp_path / "turned.jpg")).size == (375, 500)
    turned = build_index(tmp_path, progress=False)
    kind = augmentation("evaluation")
    plan = plan_batch(turned, kind, seed=0, number=0, global_batch=2, sample_ids=np.array([0, 1]), image_size=64)
    reader = ByteReader(turned)
    images = pixels(Decoder(Decoding(kind, 64, device="cpu"), 2).decode([reader.read(0), reader.read(1)], plan)[0])
    assert np.array_equal(images[0], images[1])


def test_grey_images_have_three_equal_channels(index):
    _, ours = decoded(index, "evaluation", 64)
    for i in range(len(index)):
        if "grey" in index.name(i):
            assert np.abs(ours[i] - ours[i][:1]).max() < 1e-3


def test_decoding_goes_on_after_an_image_that_cannot_be_decoded(index):
    kind = augmentation("evaluation")
    plan = plan_batch(index, kind, seed=0, number=0, global_batch=2, sample_ids=np.array([0, 1]), image_size=64)
    reader = ByteReader(index)
    decoder = Decoder(Decoding(kind, 64, device="cpu"), 2)
    good = [reader.read(0), reader.read(1)]
    before = pixels(decoder.decode(good, plan)[0])
    with pytest.raises(BadImage, match="cannot be decoded") as error:
        decoder.decode([good[0], np.frombuffer(b"text" * 100, np.uint8)], plan)
    assert "\n" not in str(error.value)
    assert np.array_equal(pixels(decoder.decode(good, plan)[0]), before)


def test_outputs_stay_what_they_are_while_more_is_decoded(index):
    kind = augmentation("random_resized_crop")
    reader = ByteReader(index)
    encoded = [reader.read(i) for i in range(8)]
    decoder = Decoder(Decoding(kind, 64, device="cpu"), 8)
    kept, copies = [], []
    for step in range(6):
        plan = plan_batch(index, kind, seed=0, number=step, global_batch=8, sample_ids=np.arange(8), image_size=64)
        kept.append(torch.from_dlpack(decoder.decode(encoded, plan)[0].as_tensor()))
        copies.append(kept[-1].clone())
    decoder.close()
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_options_of_the_gpu_are_known_to_dali_and_leave_the_cpu_as_it_is(index, monkeypatch):
    """DALI takes them on the CPU too, and does not use them there."""
    assert MIXED_DECODER["hw_decoder_load"] == 0  # the hardware engine rounds in another way than CUDA
    _, before = decoded(index, "random_resized_crop", 64)
    from nvidia.dali import fn

    image_slice = fn.decoders.image_slice

    def with_options(*inputs, **options):
        assert not MIXED_DECODER.keys() & options.keys()
        return image_slice(*inputs, **options, **MIXED_DECODER)

    monkeypatch.setattr(fn.decoders, "image_slice", with_options)
    _, after = decoded(index, "random_resized_crop", 64)
    assert np.array_equal(before, after)


def test_options_of_the_gpu_are_read_when_the_graph_is_built(index, monkeypatch):
    monkeypatch.setitem(dali_graph.MIXED_DECODER, "no_such_option", 1)
    decoded(index, "evaluation", 64)
    decoder = Decoder(Decoding(augmentation("evaluation"), 64, device="cpu"), 2)
    decoder.device = "mixed"  # the graph is defined before DALI misses the GPU
    with pytest.raises(KeyError, match="no_such_option"):
        decoder._build()


def test_device_is_the_gpu_when_there_is_one_and_the_cpu_otherwise():
    from nvidia.dali.backend import GetCUDADeviceCount

    assert decoding_device("cpu") == "cpu"
    assert decoding_device("auto") == ("mixed" if GetCUDADeviceCount() else "cpu")
    with pytest.raises(UsageError, match="expected auto, cpu or gpu"):
        decoding_device("tpu")
    if not GetCUDADeviceCount():
        with pytest.raises(UsageError, match="finds no GPU"):
            decoding_device("gpu")


def test_without_dali_the_error_names_what_to_install():
    code = (
        "import sys; sys.modules['nvidia.dali'] = None\n"
        "import data_pipeline.loader, data_pipeline.augment.kinds\n"
        "from data_pipeline.errors import UsageError\n"
        "from data_pipeline.dali_graph import decoding_device\n"
        "try: decoding_device('auto')\n"
        "except UsageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install mae-scale[cuda13]" in done.stdout


def test_reading_is_the_same_from_many_threads(index):
    from concurrent.futures import ThreadPoolExecutor

    reader = ByteReader(index)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reader.read, list(range(len(index))) * 5))
    for i, data in enumerate(found):
        assert data.tobytes() == index.path(i % len(index)).read_bytes()
    Image.open(io.BytesIO(found[0].tobytes())).load()
