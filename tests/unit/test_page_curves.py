"""The curves of a page: thinned without hiding spikes, and small however many runs there are."""

import json
import math

import numpy as np
import pytest

from mae_scale.reports.page_content import PageRun
from mae_scale.reports.page_curves import BYTES, POINTS, chart_data, curve_of, points_per_curve, script_json, thinned


def run_of(number: int, length: int) -> PageRun:
    epochs = np.linspace(0.01, 20 - number / 100, length)
    curves = {
        name: curve_of(zip(epochs, np.random.default_rng(number).random(length), strict=True))
        for name in ("train/loss", "train/grad_norm", "train/lr", "perf/images_per_second", "val/loss")
    }
    return PageRun(f"run {number}", "pretrain", "192x6", 0, 20.0, 20, "done", curves=curves)


def test_a_short_curve_stays_as_it_is():
    curve = curve_of([(1, 2.0), (2, math.inf)])
    assert thinned(curve, 2) is curve
    assert np.isnan(curve.values[1])


def test_a_thinned_curve_has_the_means_of_equal_intervals_at_their_ends():
    curve = thinned(curve_of((step, float(step)) for step in range(1, 13)), 4)
    assert curve.epochs.tolist() == [3, 6, 9, 12]
    assert curve.values.tolist() == [2, 5, 8, 11]


def test_a_value_that_is_not_finite_is_left_out_of_its_interval_and_alone_is_a_gap():
    values = [1.0, math.nan, 3.0, math.nan, math.inf, math.nan]
    assert thinned(curve_of(enumerate(values)), 2).values.tolist() == [2.0, pytest.approx(math.nan, nan_ok=True)]


def test_the_largest_of_an_interval_keeps_a_spike():
    values = [0.1] * 1000
    values[617] = 90.0
    assert thinned(curve_of(enumerate(values)), 300, largest=True).values.max() == 90
    spiky = PageRun("a", "pretrain", "", 0, 1, 1, "done", curves={"train/grad_norm": curve_of(enumerate(values))})
    data = chart_data([spiky], 300)
    assert max(data["groups"][0]["charts"][0]["series"][0][1]) == 90


@pytest.mark.parametrize(("runs", "length", "points"), [(1, 5000, POINTS[0]), (1000, 20, POINTS[0])])
def test_few_or_short_curves_are_drawn_in_full(runs, length, points):
    assert points_per_curve([run_of(number, length) for number in range(runs)]) == points


def test_many_long_curves_fit_into_the_limit():
    runs = [run_of(number, 300) for number in range(1000)]
    points = points_per_curve(runs)
    assert 30 <= points < 300
    assert len(json.dumps(chart_data(runs, points), separators=(",", ":"))) <= BYTES


def test_runs_of_one_schedule_share_their_epochs():
    runs = [run_of(0, 50), run_of(0, 50)]
    assert len(chart_data(runs, 300)["epochs"]) == 1


def test_json_in_a_script_cannot_end_it():
    text = script_json({"name": "</script><!-- & \u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"name": "</script><!-- & \u2028"}
