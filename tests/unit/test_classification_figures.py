"""The figures of a classifier show what they say."""

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image

from mae_scale.reports import classification
from mae_scale.reports.classification import ORANGE, RIGHT, WRONG, attention_figure, neighbours_figure, per_class_figure
from mae_scale.reports.style import BLUE, MEAN, STD


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they were saved."""
    caught = []
    save = classification.save_png
    monkeypatch.setattr(classification, "save_png", lambda figure, path: (caught.append(figure), save(figure, path)))
    return caught


class Written:
    """A PNG beside the figure that it was written from."""

    def __init__(self, figure, path):
        self._figure = figure
        with Image.open(path) as png:
            assert png.format == "PNG"
            self._pixels = np.asarray(png.convert("RGB")) / 255

    def at(self, axes_number: int, x: float, y: float) -> np.ndarray:
        """The colour at a place of one of the figure's axes, as shares of its width and height from the upper left."""
        box = self._figure.axes[axes_number].get_window_extent()
        row = len(self._pixels) - (box.y1 - y * box.height)
        return self._pixels[round(row), round(box.x0 + x * box.width)]


def uniform(*colours, side=32):
    """Images of one colour each, as the model takes them: [N, 3, side, side]."""
    return torch.stack([torch.tensor((to_rgb(c) - MEAN) / STD) for c in colours])[:, :, None, None].expand(
        -1, -1, side, side
    )


def report_of(accuracies):
    per_class = [
        {"class": f"name {number}", "images": 50, "top1": top1, "taken_for": {}}
        for number, top1 in enumerate(accuracies)
    ]
    return {"top1": float(np.mean(accuracies)), "images": 50 * len(accuracies), "per_class": per_class}


def named(axes):
    """{class name: bar length} from the lowest bar up."""
    names = [label.get_text() for label in axes.get_yticklabels()]
    return list(zip(names, [bar.get_width() for bar in axes.patches], strict=True))


def test_few_classes_are_bars_sorted_by_accuracy_with_names(tmp_path, drawn):
    per_class_figure(report_of([80.0, 20.0, 95.0]), tmp_path / "figures" / "per_class.png")
    (axes,) = drawn[0].axes
    assert named(axes) == [("name 1", 20.0), ("name 0", 80.0), ("name 2", 95.0)]
    assert axes.lines[0].get_xdata()[0] == 65
    png = Written(drawn[0], tmp_path / "figures" / "per_class.png")
    assert png.at(0, 19 / 124, 0.8) == pytest.approx(to_rgb(BLUE), abs=0.01)
    assert png.at(0, 25 / 124, 0.8) == pytest.approx((1, 1, 1), abs=0.01)


def test_many_classes_are_a_curve_and_the_ends_have_names(tmp_path, drawn):
    accuracies = np.random.default_rng(0).permutation(np.linspace(10, 99, 1000)).tolist()
    per_class_figure(report_of(accuracies), tmp_path / "per_class.png")
    curve, worst, best = drawn[0].axes
    assert curve.lines[0].get_ydata() == pytest.approx(sorted(accuracies))
    by_accuracy = sorted(range(1000), key=accuracies.__getitem__)
    assert [name for name, _ in named(worst)] == [f"name {number}" for number in by_accuracy[:10]]
    assert [name for name, _ in named(best)] == [f"name {number}" for number in by_accuracy[-10:]]
    assert curve.lines[1].get_ydata()[0] == pytest.approx(np.mean(accuracies))
    assert curve.lines[1].get_color() == ORANGE


def test_no_measured_image_is_no_reason_to_fail(tmp_path):
    per_class_figure({"top1": float("nan"), "images": 0, "per_class": []}, tmp_path / "per_class.png")
    assert (tmp_path / "per_class.png").stat().st_size > 0


def test_attention_maps_lie_beside_their_image_and_are_bright_where_attention_is(tmp_path, drawn):
    attention = np.zeros((2, 8, 16), np.float32)
    attention.reshape(2, 8, 4, 4)[0, 0, 0, 0] = 0.7  # head 1, upper left patch
    attention.reshape(2, 8, 4, 4)[0, 7, 3, 3] = 0.1  # head 8, lower right patch
    path = tmp_path / "attention.png"
    attention_figure(uniform("red", "lime"), torch.tensor(attention), path, 8)
    png = Written(drawn[0], path)
    assert [axes.get_title() for axes in drawn[0].axes[:6]] == [
        "image",
        "mean of heads",
        *(f"head {number} of 8" for number in (1, 3, 6, 8)),
    ]
    assert png.at(0, 0.5, 0.5) == pytest.approx((1, 0, 0), abs=0.01)
    assert png.at(6, 0.5, 0.5) == pytest.approx((0, 1, 0), abs=0.01)
    dark, bright = (colormaps[classification.MAP_COLOURS](value)[:3] for value in (0.0, 1.0))
    for axes, upper_left, lower_right in ((1, bright, None), (2, bright, dark), (3, dark, dark), (5, dark, bright)):
        assert png.at(axes, 1 / 8, 1 / 8) == pytest.approx(upper_left, abs=0.15)
        if lower_right:  # and each map is scaled by its own largest value
            assert png.at(axes, 7 / 8, 7 / 8) == pytest.approx(lower_right, abs=0.15)


def test_attention_of_another_grid_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\[2, heads, 16\], found \(2, 3, 9\)"):
        attention_figure(uniform("red", "lime"), np.zeros((2, 3, 9)), tmp_path / "x.png", 8)


def test_a_neighbour_of_another_class_has_another_frame_and_its_name(tmp_path, drawn):
    queries = uniform("red", "lime")
    neighbours = torch.stack([uniform("blue", "yellow", "cyan"), uniform("magenta", "white", "black")])
    labels, near = torch.tensor([2, 0]), np.array([[2, 1, 2], [0, 0, 1]])
    path = tmp_path / "neighbours.png"
    neighbours_figure(
        queries, neighbours, labels, near, class_names=["cat", "dog", "an animal with a long name"], path=path
    )
    png = Written(drawn[0], path)
    names = [axes.get_xlabel() for axes in drawn[0].axes]
    assert names == [
        "an animal with a …",
        "an animal with a …",
        "dog",
        "an animal with a …",
        "cat",
        "cat",
        "cat",
        "dog",
    ]
    for place, colour in enumerate(["red", "blue", "yellow", "cyan", "lime", "magenta", "white", "black"]):
        assert png.at(place, 0.5, 0.5) == pytest.approx(to_rgb(colour), abs=0.01)
    for place, frame in ((1, RIGHT), (2, WRONG), (3, RIGHT), (5, RIGHT), (6, RIGHT), (7, WRONG)):
        assert png.at(place, 0.002, 0.5) == pytest.approx(to_rgb(frame), abs=0.02)
    assert png.at(0, 0.01, 0.5) == pytest.approx((1, 0, 0), abs=0.01)
