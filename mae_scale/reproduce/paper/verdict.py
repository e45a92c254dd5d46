"""The rule by which a finding is said to hold: paired over the seeds, one-sided, at 95 %."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t

LEVEL = 0.95
SAME, OPPOSITE, UNDECIDED = "same direction", "not", "not decided"


@dataclass(frozen=True)
class Verdict:
    """The differences, one per seed, and what follows from them."""

    differences: tuple[float, ...]
    word: str

    @property
    def mean(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def margin(self) -> float | None:
        """The distance from 0 from which on the mean decides: t x sd / sqrt(n); None with one seed."""
        return margin_of(self.differences)


def margin_of(differences: Sequence[float]) -> float | None:
    """Return t(0.95, n - 1) x sd / sqrt(n): the half-width of the mean's two-sided interval at 90 %."""
    n = len(differences)
    if n < 2:
        return None
    return float(t.ppf(LEVEL, n - 1)) * statistics.stdev(differences) / n**0.5


def decide(differences: Sequence[float]) -> Verdict:
    """Return the verdict on differences that are above 0 where the claim holds.

    "same direction" where their mean lies above the margin, "not" where it lies below minus the margin, else, and with
    one seed, "not decided".
    """
    margin, mean = margin_of(differences), statistics.fmean(differences)
    word = UNDECIDED
    if margin is not None and abs(mean) > margin:
        word = SAME if mean > 0 else OPPOSITE
    return Verdict(tuple(differences), word)
