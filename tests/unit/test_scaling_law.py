"""Power laws: published fits are found again from points drawn on them, and the intervals hold what they promise."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from data_pipeline.errors import UsageError
from mae_scale.planning.scaling_law import LEVEL, PowerLaw, fit, frontier, has_irreducible_term

# Zhai et al., "Scaling Vision Transformers" (arXiv 2106.04560), figure 2: ImageNet error against compute.
PUBLISHED = {"fine-tuning": PowerLaw(0.09, 0.26, 0.35, 0.01), "ten-shot": PowerLaw(0.12, 0.63, 0.32, 0.52)}
X = np.geomspace(0.1, 1000, 16)
DRAWS, NOISE = 12, 0.02


def drawn(law: PowerLaw, seed: int, x=X) -> np.ndarray:
    return law(x) * (1 + NOISE * np.random.default_rng(seed).standard_normal(len(x)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_fit_is_found_again_from_points_on_it(name):
    law = PUBLISHED[name]
    found = fit(X, law(X), irreducible=True, shifted=True)
    for constant, expected in vars(law).items():
        assert getattr(found.law, constant) == pytest.approx(expected, rel=5e-3)
    assert np.abs(found.residuals).max() < 1e-5


@pytest.mark.parametrize("name", PUBLISHED)
def test_with_noise_a_published_fits_constants_lie_in_their_intervals_nine_times_of_ten(name):
    law, inside = PUBLISHED[name], []
    for seed in range(DRAWS):
        found = fit(X, drawn(law, seed), irreducible=True, shifted=True, seed=seed)
        inside += [low <= getattr(law, constant) <= high for constant, (low, high) in found.interval.items()]
        low, high = found.band(X)
        inside += ((low <= law(X)) & (law(X) <= high)).tolist()
    assert np.mean(inside) >= 0.9


@pytest.mark.slow
def test_intervals_and_the_band_of_a_new_run_hold_it_as_often_as_they_say_and_are_no_wider_than_needed():
    law, inside, new, widths = PowerLaw(0.3, 1.2, 0.4, 0), [], [], []
    x = np.geomspace(1, 300, 9)
    for seed in range(2 * DRAWS):
        y = drawn(law, seed, x)
        found = fit(x, y, irreducible=True, seed=seed)
        inside += [low <= getattr(law, constant) <= high for constant, (low, high) in found.interval.items()]
        low, high = fit(x[:-1], y[:-1], irreducible=True, seed=seed).band_of_a_point(x[-1], seed=seed)
        new.append(low <= y[-1] <= high)
        widths.append((high - low) / law(x[-1]))
    assert abs(np.mean(inside) - LEVEL) < 0.08
    assert np.mean(new) >= 0.85
    assert 4 * NOISE / 2 < np.median(widths) < 10 * NOISE


def test_it_is_the_optimum_that_scipy_finds():
    law = PowerLaw(0.3, 1.2, 0.4, 0)
    y = drawn(law, 5)
    found = fit(X, y, irreducible=True).law
    peer = least_squares(lambda p: (y - p[0] - p[1] * X ** -p[2]) / y, (0.2, 1.0, 0.5), bounds=(0, np.inf))
    assert [found.E, found.A, found.alpha] == pytest.approx(peer.x, rel=1e-4)


def test_without_an_irreducible_term_there_is_none():
    found = fit(X, 2 * X**-0.25, irreducible=False)
    assert vars(found.law) == pytest.approx({"E": 0, "A": 2, "alpha": 0.25, "c": 0}, rel=1e-5)
    assert set(found.interval) == {"A", "alpha"}


def test_an_irreducible_term_is_never_negative():
    y = 2 * X**-0.25 - 0.2  # falls faster than any power
    assert fit(X[:8], y[:8], irreducible=True).law.E == 0


def test_the_frontier_is_what_nothing_cheaper_equals():
    x = np.array([4, 1, 2, 3, 2, 5.0])
    y = np.array([0.5, 0.9, 0.7, 0.7, 0.6, 0.4])
    assert frontier(x, y).tolist() == [1, 4, 0, 5]
    assert frontier(x[:1], y[:1]).tolist() == [0]


@pytest.mark.parametrize(
    ("x", "expected"), [(np.geomspace(1, 10, 6), True), (np.geomspace(1, 9, 6), False), (np.geomspace(1, 99, 5), False)]
)
def test_an_irreducible_term_takes_six_points_over_a_factor_of_ten(x, expected):
    assert has_irreducible_term(x) is expected


def test_too_few_points_are_refused():
    with pytest.raises(UsageError, match="needs 3 points, found 2"):
        fit(X[:2], X[:2], irreducible=False)
    with pytest.raises(UsageError, match="with a shift needs 10 points, found 9"):
        fit(X[:9], X[:9], irreducible=True, shifted=True)
