"""Intersection over union of a whole set, and predictions by windows that overlap."""

import math

import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from data_pipeline.annotations.label_maps import IGNORED
from data_pipeline.errors import UsageError
from mae_scale.tasks.segmentation.pixel_counts import PixelCounts
from mae_scale.tasks.segmentation.windows import by_windows, number_of_windows, starts_of

CLASSES = 6


def images(seed: int, count: int = 5):
    """Labels and predictions of some images; class 4 is in none, class 5 neither there nor found, some are ignored."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count, 9, 7), generator=draws)
    wrong = torch.rand(labels.shape, generator=draws) < 0.3
    predicted = torch.where(wrong, torch.randint(0, 5, labels.shape, generator=draws), labels)
    labels[torch.rand(labels.shape, generator=draws) < 0.1] = IGNORED
    return labels.to(torch.uint8), predicted


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_scikit_learns_of_all_pixels_together(seed):
    labels, predicted = images(seed)
    counts = PixelCounts(CLASSES)
    for part in (slice(0, 2), slice(2, 5)):
        counts.update(predicted[part], labels[part])
    counted = labels != IGNORED
    true, found = labels[counted].numpy(), predicted[counted].numpy()
    assert counts.pixels.tolist() == confusion_matrix(true, found, labels=range(CLASSES)).tolist()
    expected = jaccard_score(true, found, labels=range(5), average=None, zero_division=0) * 100
    assert counts.per_class()[:5] == pytest.approx(expected.tolist())
    assert math.isnan(counts.per_class()[5])
    results = counts.results()
    assert results["mean_iou"] == pytest.approx(expected.mean())  # class 4, which is found and nowhere, counts as 0
    assert results["pixel_accuracy"] == pytest.approx(100 * (true == found).mean())
    assert results["mean_accuracy"] == pytest.approx(sum(100 * (found[true == c] == c).mean() for c in range(4)) / 4)
    assert results["pixels"] == counted.sum()


def test_nothing_counted_is_nan_and_a_label_that_is_no_class_is_refused():
    counts = PixelCounts(2)
    counts.update(torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), IGNORED))
    assert all(math.isnan(value) for name, value in counts.results().items() if name != "pixels")
    with pytest.raises(ValueError, match="labels are 0 to 2, of 2 classes"):
        counts.update(torch.zeros(1, 1, 2, dtype=torch.int64), torch.tensor([[[0, 2]]]))


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [
        (512, 512, 341, [0]),
        (683, 512, 341, [0, 171]),
        (853, 512, 341, [0, 341]),
        (1000, 512, 341, [0, 341, 488]),
        (300, 512, 341, [0]),
        (10, 4, 4, [0, 4, 6]),
    ],
)
def test_windows_begin_every_stride_and_the_last_ends_at_the_edge(length, window, stride, starts):
    assert starts_of(length, window, stride) == starts


def test_a_stride_that_leaves_gaps_is_refused():
    with pytest.raises(UsageError, match="windows of 4 px every 5 px"):
        starts_of(10, 4, 5)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (13, 9), (5, 21)])
def test_what_depends_on_a_pixel_alone_is_the_same_by_windows(height, width):
    def model(x):
        assert x.shape[-2:] == (8, 8)
        return torch.cat([x, x.square()], dim=1)

    images = torch.randn(2, 3, height, width)
    expected = torch.cat([images, images.square()], dim=1)
    assert torch.allclose(by_windows(model, images, window=8, stride=5), expected, atol=1e-6)


def test_a_pixel_of_several_windows_has_their_mean():
    seen = iter(range(10))
    found = by_windows(
        lambda x: torch.full((1, 1, 4, 4), float(next(seen))), torch.zeros(1, 3, 4, 7), window=4, stride=3
    )
    assert found[0, 0, 0].tolist() == [0, 0, 0, 0.5, 1, 1, 1]


def test_a_model_that_ranks_share_is_called_as_often_as_by_the_image_with_most_windows():
    called = []

    def model(part):
        called.append(tuple(part.shape))
        return part[:, :1]

    images = torch.randn(1, 3, 8, 12)
    alone = by_windows(model, images, window=8, stride=4)
    assert len(called) == number_of_windows(8, 12, window=8, stride=4) == 2
    called.clear()
    assert torch.equal(by_windows(model, images, window=8, stride=4, calls=5), alone)
    assert called == [(1, 3, 8, 8)] * 5
