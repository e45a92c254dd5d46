"""RandAugment and random erasing in the loader: pixels beside timm's (Pillow's), and the same bytes however loaded.

Tolerances are levels of 255, at 224 pixels. Of the operations on colours, those of whole numbers and those that weigh
with one factor are exact. AutoContrast and Color may be 1 off where Pillow's floating point falls just below a whole
level, Equalize 2, because Pillow rounds its step to whole pixels. Bicubic geometry differs by its coefficient and by
a few pixels along the edge of the image: the mean over the inside is compared, and the fill well outside.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import auto_augment

from data_pipeline.augment.kinds import augmentation
from data_pipeline.augment.rand_augment import FILL, ROTATE, TRANSLATE_X, apply_operations, to_arguments, to_matrices
from data_pipeline.augment.random_erasing import erasing_noise
from data_pipeline.byte_reader import ByteReader
from data_pipeline.dali_graph import Decoding
from data_pipeline.decoder import Decoder
from data_pipeline.index_build import build_index
from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from data_pipeline.plan import plan_batch
from data_pipeline.samples import write_digits, write_photos
from tests.loaders import SEED, collect, on_cpu, same
from tests.unit.test_rand_augment import TIMM

SIZE, BATCH = 224, 12
LARGEST = {"AutoContrast": 1, "ColorIncreasing": 1, "Equalize": 2}  # of the operations on colours; the others exact
STRENGTHS = [(magnitude, sign) for magnitude in (0, 3.3, 8, 9, 9.7, 10) for sign in (1, -1)]
ERASING = augmentation("rand_augment", erasing=0.5)
DECODING = Decoding(ERASING, 32, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return build_index(write_photos(tmp_path_factory.mktemp("photos") / "photos", 4), progress=False)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "digits") / "val"


@pytest.fixture(scope="module")
def images(photos) -> dict[str, Image.Image]:
    """Two photographs, noise, a gradient of few levels and an image of one colour."""
    numbers = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(SIZE), np.arange(SIZE))[..., None] * np.array([60, 90, 120]) / (2 * SIZE) + 20
    pixels = {
        "noise": numbers.integers(0, 256, (SIZE, SIZE, 3)),
        "gradient": ramp,
        "plain": np.full((SIZE, SIZE, 3), (200, 100, 7)),
    }
    found = {name: Image.fromarray(image.astype(np.uint8)) for name, image in pixels.items()}
    for i in (0, 1):
        found[f"photo {i}"] = Image.open(photos.path(i)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return found


@pytest.fixture(scope="module")
def ours():
    """A function: up to BATCH images with operations and arguments [n, 2] applied, uint8 [n, SIZE, SIZE, 3]."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(enable_conditionals=True, batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        return apply_operations(
            fn.external_source(name="images", ndim=3, layout="HWC", dtype=types.UINT8),
            fn.external_source(name="operations", ndim=1, dtype=types.INT32),
            fn.external_source(name="arguments", ndim=1, dtype=types.FLOAT),
            fn.external_source(name="matrices", ndim=3, dtype=types.FLOAT),
        )

    pipeline = graph()
    pipeline.build()

    def run(images: list[Image.Image], operations: np.ndarray, arguments: np.ndarray) -> np.ndarray:
        inputs = {"operations": operations.astype(np.int32), "arguments": arguments.astype(np.float32)}
        matrices = to_matrices(inputs["operations"], inputs["arguments"], SIZE)
        return pipeline.run(images=[np.asarray(i) for i in images], matrices=matrices, **inputs)[0].as_array()

    return run


def one_layer(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Operations and arguments [12, 2] of STRENGTHS: the operation in the first layer, nothing in the second."""
    operations = np.full((len(STRENGTHS), 2), -1)
    operations[:, 0] = TIMM[name]
    magnitudes, signs = np.array(STRENGTHS).T
    arguments = np.zeros((len(STRENGTHS), 2), np.float32)
    arguments[:, 0] = to_arguments(operations[:, 0], magnitudes, signs)
    return operations, arguments


def theirs(image: Image.Image, name: str, argument: float, fill=FILL, resample=Image.Resampling.BICUBIC):
    if name == "PosterizeIncreasing" and argument == 0:
        return Image.new("RGB", image.size)  # newer Pillows refuse to keep no bits
    if name in ("PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"):
        argument = int(argument)
    function = auto_augment.NAME_TO_OP[name]
    wanted = () if auto_augment.LEVEL_TO_ARG[name] is None else (argument,)
    return function(image, *wanted, fillcolor=tuple(map(int, fill)), resample=resample)


def difference(one, other) -> np.ndarray:
    return np.abs(np.asarray(one, float) - np.asarray(other, float))


@pytest.mark.parametrize("name", [name for name in TIMM if TIMM[name] < ROTATE])
def test_operations_on_colours_are_timms(ours, images, name):
    operations, arguments = one_layer(name)
    for kind, image in images.items():
        for (strength, found), (argument, _) in zip(
            zip(STRENGTHS, ours([image] * BATCH, operations, arguments), strict=True), arguments, strict=True
        ):
            wrong = difference(found, theirs(image, name, float(argument)))
            if name == "SharpnessIncreasing":  # Pillow leaves the outermost pixels alone
                wrong = wrong[1:-1, 1:-1]
            assert wrong.max() <= LARGEST.get(name, 0), (kind, strength)
            if name in ("AutoContrast", "ColorIncreasing"):
                assert wrong.mean() < 0.03, (kind, strength)


@pytest.mark.parametrize("name", [name for name in TIMM if TIMM[name] >= ROTATE])
def test_geometric_operations_are_timms(ours, images, name):
    """Bilinear for bicubic, or a quarter of a pixel elsewhere, would differ by more on the photographs."""
    operations, arguments = one_layer(name)
    white = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
    for kind in ("photo 0", "photo 1", "gradient"):
        results = ours([images[kind]] * BATCH, operations, arguments)
        for strength, found, (argument, _) in zip(STRENGTHS, results, arguments, strict=True):
            covered = theirs(white, name, float(argument), (0, 0, 0), Image.Resampling.NEAREST)
            inside = np.asarray(covered.filter(ImageFilter.MinFilter(7))) == 255
            outside = np.asarray(covered.filter(ImageFilter.MaxFilter(7))) == 0
            wrong = difference(found, theirs(images[kind], name, float(argument)))
            assert inside.mean() > 0.5
            assert wrong[inside].mean() < (0.6 if kind == "gradient" else 1.2), (kind, strength)
            if strength[0] == 0:
                assert wrong.max() == 0
            elif strength[0] >= 8:
                assert outside.any()
                assert (np.broadcast_to(FILL, found.shape)[outside] == found[outside]).all(), (kind, strength)


def test_layers_follow_one_another_and_a_layer_may_do_nothing(ours, images):
    image = images["photo 0"]
    pairs = [("Invert", "SolarizeAdd"), ("SolarizeAdd", "Invert"), ("ColorIncreasing", "ColorIncreasing")]
    operations = np.array([[-1, -1], *[[TIMM[name] for name in pair] for pair in pairs], [-1, TIMM["Invert"]]])
    arguments = np.array([[0, 0], [0, 90], [90, 0], [1.8, 0.2], [0, 0]])
    results = ours([image] * 5, operations, arguments)
    assert np.array_equal(results[0], image)
    assert np.array_equal(results[4], ImageOps.invert(image))
    for pair, found, (first, second) in zip(pairs, results[1:4], arguments[1:4].tolist(), strict=True):
        assert difference(found, theirs(theirs(image, pair[0], first), pair[1], second)).max() <= 2


def decoded(index, **changes) -> np.ndarray:
    """The first image of the index, whole and still unflipped, with `changes` of its plan: float [SIZE, SIZE, 3]."""
    kind = augmentation("rand_augment")
    height, width = int(index.height[0]), int(index.width[0])
    plan = plan_batch(index, kind, seed=0, number=0, global_batch=1, sample_ids=np.array([0]), image_size=SIZE)
    columns = {
        "crops": np.array([[0, 0, height, width]], np.int32),
        "regions": np.array([[0, 0, height, width]], np.float32),
        "flips": np.array([0], np.int32),
        "operations": np.full((1, 2), -1, np.int32),
        "arguments": np.zeros((1, 2), np.float32),
    }
    decoder = Decoder(Decoding(kind, SIZE, device="cpu"), 1)
    images = decoder.decode([ByteReader(index).read(0)], replace(plan, **columns | changes))[0].as_array()
    return (images[0].transpose(1, 2, 0) * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)) * 255


def test_images_are_flipped_first_and_normalised_last(photos):
    """Moved right by a fifth: of the flipped image, the fill is on the left whether it was flipped or not."""
    plain = Image.fromarray(np.rint(decoded(photos)).astype(np.uint8))
    moved = {
        "operations": np.array([[TRANSLATE_X, -1]], np.int32),
        "arguments": np.array([[-0.25, 0]], np.float32),
    }
    right = theirs(plain, "TranslateXRel", -0.25)
    assert difference(decoded(photos, **moved), right).max() < 0.51
    flipped = decoded(photos, flips=np.array([1], np.int32), **moved)
    assert difference(flipped, theirs(ImageOps.mirror(plain), "TranslateXRel", -0.25)).max() < 0.51
    assert difference(flipped, ImageOps.mirror(right)).mean() > 10


@pytest.fixture(scope="module")
def index(digits):
    return build_index(digits, progress=False)


@pytest.fixture(scope="module")
def reference(index):
    return collect(index, decoding=DECODING)


@pytest.mark.parametrize(
    "options",
    [
        {"world_size": 2},
        {"micro_batch": 4},
        {"world_size": 3, "micro_batch": 2, "decoding": replace(DECODING, threads=1)},
        {"decoding": replace(DECODING, threads=5), "prefetch": 7},
        {"steps": (2, 4), "world_size": 2, "micro_batch": 6},
    ],
    ids=["2 ranks", "accumulation", "3 ranks, accumulation, 1 thread", "5 threads, prefetch", "from the middle"],
)
def test_the_augmented_batch_has_the_same_bytes(index, reference, options):
    found = collect(index, **{"decoding": DECODING} | options)
    assert same(found, {step: reference[step] for step in found})
    assert len(found) == (2 if "steps" in options else 4)


def plan_of(index, step: int, **changes):
    common = {"seed": SEED, "image_size": DECODING.image_size, "global_batch": 24}
    return plan_batch(index, ERASING, number=step, **common, **changes)


def test_boxes_are_filled_with_noise_and_nothing_else_is_touched(index, reference):
    whole = collect(index, decoding=on_cpu(kind="rand_augment"))
    changed = 0
    for step, (images, *_) in reference.items():
        expected = whole[step][0].clone()
        plan = plan_of(index, step)
        for place, noise in erasing_noise(plan.erase, plan.positions, seed=SEED, number=step):
            expected[place] = torch.from_numpy(noise)
            changed += 1
        assert torch.equal(images, expected)
    assert 24 < changed < 72


def test_a_replacement_is_augmented_and_erased_as_its_position(index, digits, tmp_path):
    """The batch is that of an index in which the replacement's bytes are stored in the place of the bad image."""
    shutil.copytree(digits, tmp_path / "bad")
    shutil.copytree(digits, tmp_path / "good")
    bad, good = (build_index(tmp_path / name, progress=False) for name in ("bad", "good"))
    plan = plan_of(bad, 0)
    row = int(np.flatnonzero((plan.erase[:, 2] > 0) & (plan.operations >= 0).all(axis=1))[0])
    image = int(plan.sample_ids[row])
    bad.path(image).write_bytes(b"no image")
    shutil.copyfile(bad.path(image + 1), good.path(image))
    good = build_index(tmp_path / "good", progress=False)
    found = collect(bad, decoding=DECODING, steps=(0, 1), micro_batch=6)[0]
    assert found[4] == 1
    assert torch.equal(found[0], collect(good, decoding=DECODING, steps=(0, 1))[0][0])
