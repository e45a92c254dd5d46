"""RandAugment draws what timm's `rand-m9-mstd0.5-inc1` draws: by its level functions, and beside timm itself."""

import random

import numpy as np
import pytest
from scipy.stats import chi2_contingency, ks_2samp
from timm.data import auto_augment, create_transform

from data_pipeline.augment import rand_augment
from data_pipeline.rng import generator

TIMM = {
    "AutoContrast": rand_augment.AUTO_CONTRAST,
    "Equalize": rand_augment.EQUALIZE,
    "Invert": rand_augment.INVERT,
    "PosterizeIncreasing": rand_augment.POSTERIZE,
    "SolarizeIncreasing": rand_augment.SOLARIZE,
    "SolarizeAdd": rand_augment.SOLARIZE_ADD,
    "BrightnessIncreasing": rand_augment.BRIGHTNESS,
    "ContrastIncreasing": rand_augment.CONTRAST,
    "ColorIncreasing": rand_augment.COLOR,
    "SharpnessIncreasing": rand_augment.SHARPNESS,
    "Rotate": rand_augment.ROTATE,
    "ShearX": rand_augment.SHEAR_X,
    "ShearY": rand_augment.SHEAR_Y,
    "TranslateXRel": rand_augment.TRANSLATE_X,
    "TranslateYRel": rand_augment.TRANSLATE_Y,
}
COUNT = 20_000


@pytest.fixture(scope="module")
def ours():
    numbers = generator(0, "test", 0)
    return rand_augment.draw_operations(numbers.random((COUNT, 2, 3)), numbers.standard_normal((COUNT, 2)))


@pytest.fixture(scope="module")
def theirs():
    """timm's RandAugment run COUNT times on lists, to which its operations, replaced, add their arguments."""
    whole = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": (124, 116, 104)})
    for operation in whole.ops:
        name = operation.name
        operation.aug_fn = lambda seen, *argument, name=name, **_: [*seen, (TIMM[name], *argument)]
    random.seed(0)
    np.random.seed(0)
    return [whole([]) for _ in range(COUNT)]


def test_the_operations_are_timms_fifteen():
    assert set(TIMM) == set(auto_augment._RAND_INCREASING_TRANSFORMS)
    assert sorted(TIMM.values()) == list(range(rand_augment.OPERATIONS))


def test_the_fill_colour_is_that_of_timms_training_transform():
    transform = create_transform(224, is_training=True, auto_augment="rand-m9-mstd0.5-inc1")
    (whole,) = [part for part in transform.transforms if isinstance(part, auto_augment.RandAugment)]
    assert {operation.kwargs["fillcolor"] for operation in whole.ops} == {rand_augment.FILL}
    assert whole.num_layers == rand_augment.LAYERS


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", TIMM)
def test_arguments_are_timms_at_every_magnitude(monkeypatch, name, sign):
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
    function = auto_augment.LEVEL_TO_ARG[name]
    magnitudes = np.append(np.linspace(0, 10, 1001), generator(0, "test", 1).random(1000) * 10)
    found = rand_augment.to_arguments(np.full(2001, TIMM[name]), magnitudes, np.full(2001, sign))
    expected = [function(float(magnitude), {})[0] if function else 0 for magnitude in magnitudes]
    assert found.dtype == np.float32
    assert np.array_equal(found, np.array(expected, np.float32))


def test_pairs_of_operations_are_as_frequent_as_timms(ours, theirs):
    """All 15 x 15 ordered pairs, of images where both layers were applied, and how many layers were."""
    operations, _ = ours
    both = operations[(operations >= 0).all(axis=1)]
    pairs = [np.bincount(both @ [15, 1], minlength=225)]
    pairs.append(np.bincount([15 * seen[0][0] + seen[1][0] for seen in theirs if len(seen) == 2], minlength=225))
    assert min(map(np.min, pairs)) > 0  # with replacement: the same one twice as well
    assert chi2_contingency(pairs).pvalue > 0.001
    applied = [np.bincount((operations >= 0).sum(axis=1)), np.bincount([len(seen) for seen in theirs])]
    assert chi2_contingency(applied).pvalue > 0.001
    first, second = (operations >= 0).mean(axis=0)
    assert abs(first - 0.5) < 0.015
    assert abs(second - 0.5) < 0.015


@pytest.mark.parametrize("name", TIMM)
def test_arguments_are_distributed_as_timms(ours, theirs, name):
    """Their signs with them: an argument or a factor on the wrong side of its middle moves half of the distribution."""
    operations, arguments = ours
    found = arguments[operations == TIMM[name]]
    expected = [argument for seen in theirs for operation, *argument in seen if operation == TIMM[name]]
    assert abs(len(found) - len(expected)) < 4 * np.sqrt(2 * len(expected))
    if expected[0]:
        assert ks_2samp(found, np.array(expected, np.float32)[:, 0]).pvalue > 0.001
    else:
        assert not found.any()


def test_magnitudes_are_normal_around_nine_and_clipped(ours):
    """Read back from the rotations, 3 degrees a unit, whose sign is as often minus as plus."""
    operations, arguments = ours
    angles = arguments[operations == rand_augment.ROTATE]
    magnitudes = np.abs(angles) / 3
    assert abs(magnitudes.mean() - 9) < 0.06
    assert abs(magnitudes.std() - 0.5) < 0.04
    assert magnitudes.max() == 10
    assert 0.01 < (magnitudes == 10).mean() < 0.04  # beyond two standard deviations: 0.023
    assert abs((angles < 0).mean() - 0.5) < 0.06


def test_matrices_leave_images_of_other_operations_alone():
    operations = np.array([[-1, rand_augment.SOLARIZE], [rand_augment.COLOR, rand_augment.SHEAR_Y]])
    matrices = rand_augment.to_matrices(operations, np.full((2, 2), 0.25, np.float32), 224)
    assert matrices.dtype == np.float32
    assert np.array_equal(matrices[0], [np.eye(3)] * 2)
    assert np.array_equal(matrices[1], [np.eye(3), [[1, 0, 0], [0.25, 1, 0], [0, 0, 1]]])
