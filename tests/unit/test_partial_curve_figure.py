"""The figure of partial fine-tuning."""

import pytest
from PIL import Image

from mae_scale.reports import partial_curve
from mae_scale.reports.partial_curve import partial_curve_figure


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they were saved."""
    caught = []
    save = partial_curve.save_png
    monkeypatch.setattr(partial_curve, "save_png", lambda figure, path: (caught.append(figure), save(figure, path)))
    return caught


def test_partial_curve_stands_at_equal_distances_in_the_order_of_blocks(tmp_path, drawn):
    points = [(4, 90.0, 0.2), (0, 70.0, 0.5), (0.5, 80.0, None), (1, 84.0, None)]
    partial_curve_figure(points, tmp_path / "partial.png", depth=4)
    (axes,) = drawn[0].axes
    full, curve, *_ = axes.lines
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.5", "1", "4"]
    assert curve.get_xydata().tolist() == [[0, 70], [1, 80], [2, 84], [3, 90]]
    assert (full.get_ydata()[0], full.get_linestyle()) == (90, "--")
    spans = [bars.get_paths()[0].vertices[:, 1].tolist() for bars in axes.collections]
    assert spans == [pytest.approx([69.5, 70.5]), pytest.approx([89.8, 90.2])]
    with Image.open(tmp_path / "partial.png") as png:
        assert min(png.size) > 400


def test_partial_curve_that_ends_before_the_whole_depth_has_no_line_of_full_fine_tuning(tmp_path, drawn):
    partial_curve_figure([(0, 70.0, None), (1, 80.0, None)], tmp_path / "partial.png", depth=4)
    assert [line.get_linestyle() for line in drawn[0].axes[0].lines] == ["-"]
