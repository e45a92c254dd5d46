"""Power laws of loss or error against compute, data or model size: L(x) = E + A (x + c)^-alpha.

The form is that of Kaplan et al. (arXiv 2001.08361), with an irreducible term E as Hoffmann et al. (arXiv 2203.15556)
and a shift c as Zhai et al. (arXiv 2106.04560); both are 0 unless they are fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UsageError

Array = NDArray[np.float64]

FEWEST_POINTS = 3
POINTS_FOR_E, SPAN_FOR_E = 6, 10.0
"""An irreducible term is fitted to no fewer points, and to none that span a smaller factor in x."""
POINTS_FOR_SHIFT = 10
LEVEL = 0.95
REPLICATES = 200
ALPHAS, SHIFTS = np.geomspace(0.001, 4, 81), np.geomspace(0.01, 100, 21)
ZOOMS, ZOOM_POINTS = 12, 9


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = E + A (x + c)^-alpha."""

    E: float
    A: float
    alpha: float
    c: float

    def __call__(self, x: Array | float) -> Array:
        """Return L at x."""
        return self.E + self.A * (np.asarray(x, float) + self.c) ** -self.alpha


@dataclass(frozen=True)
class Fit:
    """A power law fitted to points, and what it leaves open.

    `interval` is {"E": (low, high), ...} with probability LEVEL, of the constants that were fitted. `residuals` [n] are
    relative: (y - L(x)) / y. `replicates` are laws fitted to points drawn anew around the law.
    """

    law: PowerLaw
    interval: dict[str, tuple[float, float]]
    residuals: Array
    noise: float
    """Standard deviation of a point around the law, relative to it."""
    replicates: tuple[PowerLaw, ...]

    def band(self, x: Array | float) -> tuple[Array, Array]:
        """Return the LEVEL band of the law itself at x."""
        return _between(np.array([law(x) for law in self.replicates]))

    def band_of_a_point(self, x: float, *, seed: int = 0) -> tuple[float, float]:
        """Return the LEVEL band of a new run's value at x: that of the law, and the noise of one run."""
        drawn = np.array([law(x) for law in self.replicates])
        drawn *= 1 + self.noise * np.random.default_rng(seed).standard_normal(len(drawn))
        low, high = _between(drawn)
        return float(low), float(high)


def frontier(x: Array, y: Array) -> NDArray[np.intp]:
    """Return the rows, by ascending x, that nothing cheaper equals: y is lower than at every smaller or equal x."""
    order, best, kept = np.lexsort((y, x)), np.inf, []
    for row in order:
        if y[row] < best:
            kept.append(row)
            best = y[row]
    return np.array(kept, np.intp)


def has_irreducible_term(x: Array) -> bool:
    """Return whether an irreducible term can be told from points at x: enough of them, far enough apart."""
    return len(x) >= POINTS_FOR_E and float(x.max() / x.min()) >= SPAN_FOR_E


def fit(x: Array, y: Array, *, irreducible: bool, shifted: bool = False, seed: int = 0) -> Fit:
    """Return the law of least squares through points x, y > 0 [n], of relative residuals: seeds scatter in proportion.

    For each exponent (and shift) E and A are those of a linear least-squares problem with E >= 0, A > 0, so that the
    exponent is found on a grid that is refined, and is the best one. The intervals come from a parametric bootstrap:
    points drawn anew around the law, by normal noise whose standard deviation is itself drawn from what n points tell
    of it. Raises UsageError for fewer points than FEWEST_POINTS, or POINTS_FOR_SHIFT with a shift.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    needed = POINTS_FOR_SHIFT if shifted else FEWEST_POINTS
    if len(x) < needed:
        raise UsageError(f"a power law{' with a shift' if shifted else ''} needs {needed} points, found {len(x)}")
    constants = _solve(x, y[None], irreducible=irreducible, shifted=shifted)
    law = PowerLaw(*constants[0].tolist())
    residuals = (y - law(x)) / y
    free = max(1, len(x) - 2 - irreducible - shifted)
    random = np.random.default_rng(seed)
    noise = float(np.sqrt((residuals**2).sum() / free))
    sigma = noise * np.sqrt(free / random.chisquare(free, (REPLICATES, 1)))
    drawn = law(x) * np.clip(1 + sigma * random.standard_normal((REPLICATES, len(x))), 0.05, None)
    again = _solve(x, drawn, irreducible=irreducible, shifted=shifted)
    fitted = {"E": irreducible, "A": True, "alpha": True, "c": shifted}
    low, high = _between(again)
    interval = {name: (float(low[column]), float(high[column])) for column, name in enumerate(fitted) if fitted[name]}
    return Fit(law, interval, residuals, noise, tuple(PowerLaw(*row) for row in again.tolist()))


def _between(values: Array) -> tuple[Array, Array]:
    """Return the bounds of the middle LEVEL of values [replicates, ...]."""
    low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    return low, high


def _solve(x: Array, y: Array, *, irreducible: bool, shifted: bool) -> Array:
    """Return E, A, alpha, c [m, 4] of the m sets of values y [m, n] at x [n]."""
    unit = float(np.exp(np.log(x).mean()))  # so that powers stay near 1
    shifts = np.concatenate([[0.0], x.min() * SHIFTS]) if shifted else np.zeros(1)
    found = np.empty((len(y), 4))
    for row, values in enumerate(y):
        alphas, cs = ALPHAS, shifts
        for _ in range(1 + ZOOMS):
            alpha, c = (grid.ravel() for grid in np.meshgrid(alphas, cs, indexing="ij"))
            powers = ((x + c[:, None]) / unit) ** -alpha[:, None]  # [grid, n]
            E, A, loss = _linear(powers, values, irreducible=irreducible)
            best = int(np.argmin(loss))
            alphas, cs = _around(alphas, alpha[best]), _around(cs, c[best])
        found[row] = E[best], A[best] * unit ** alpha[best], alpha[best], c[best]
    return found


def _linear(powers: Array, y: Array, *, irreducible: bool) -> tuple[Array, Array, Array]:
    """Return E >= 0, A [grid] and the squared relative residuals [grid] of y [n] = E + A powers [grid, n]."""
    p, one = powers / y, 1 / y
    pp, po, oo, p1, o1 = (p * p).sum(1), (p * one).sum(1), (one * one).sum(), p.sum(1), one.sum()
    A, E = p1 / pp, np.zeros(len(p))
    if irreducible:
        determinant = np.maximum(pp * oo - po**2, 1e-12 * pp * oo)
        both_E, both_A = (o1 * pp - p1 * po) / determinant, (p1 * oo - o1 * po) / determinant
        inside = (both_E > 0) & (both_A > 0)
        E, A = np.where(inside, both_E, E), np.where(inside, both_A, A)
    residuals = 1 - E[:, None] * one - A[:, None] * p
    return E, A, (residuals**2).sum(1)


def _around(grid: Array, best: float) -> Array:
    """Return a finer grid around the best value, as far as its farther neighbour to both sides, none below 0."""
    if len(grid) == 1:
        return grid
    place = int(np.argmin(np.abs(grid - best)))
    reach = np.abs(grid[max(0, place - 1) : place + 2] - best).max()
    return np.linspace(max(0.0, best - reach), best + reach, ZOOM_POINTS)
