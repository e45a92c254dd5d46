"""`mae-scale scaling fit`: a law through the points of a sweep, and what it says of the largest run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UsageError
from mae_scale.planning.scaling_law import (
    FEWEST_POINTS,
    LEVEL,
    POINTS_FOR_E,
    POINTS_FOR_SHIFT,
    SPAN_FOR_E,
    Fit,
    fit,
    frontier,
    has_irreducible_term,
)
from mae_scale.reports.scaling_fit import Drawn, Prediction, scaling_fit_figure
from mae_scale.tasks.scaling_points import AXES, Point
from mae_scale.tracking.mlflow_sweep import MlflowSweep


@dataclass(frozen=True)
class ScalingFit:
    """Points by ascending x, the rows of those on the frontier, the law through these, and a prediction of the last."""

    x: str
    y: str
    points: list[Point]
    on_frontier: list[int]
    irreducible: bool
    fit: Fit
    prediction: Prediction | None

    @property
    def y_label(self) -> str:
        """Return what y is."""
        return f"error (100 - {self.y}, %)" if self.y.endswith("top1") else self.y

    @property
    def formula(self) -> str:
        """Return the law with its numbers."""
        law = self.fit.law
        base = f"(x + {law.c:.3g})" if law.c else "x"
        return f"L = {f'{law.E:.4g} + ' if self.irreducible else ''}{law.A:.4g} {base}^-{law.alpha:.3g}"

    def lines(self) -> list[str]:
        """Return human-readable lines."""
        runs, shown = sum(point.runs for point in self.points), set(self.on_frontier)
        what = f"{self.y_label} against {AXES[self.x][0]}"
        said = [f"{what}: {runs} runs, {len(self.points)} points, {len(shown)} of them on the frontier"]
        width = max(len(point.name) for point in self.points)
        for row, point in enumerate(self.points):
            law = float(self.fit.law(point.x))
            there = f"fit {law:10.4g} ({1 - law / point.y:+.1%})" if row in shown else "not on the frontier"
            said.append(f"  {point.name:{width}}  {point.size:>9}  x {point.x:10.4g}  y {point.y:10.4g}  {there}")
        said.append(f"{self.formula}, least squares of relative residuals; {LEVEL:.0%} intervals:")
        for name, (low, high) in self.fit.interval.items():
            said.append(f"  {name:5} {getattr(self.fit.law, name):.4g} ({low:.4g} to {high:.4g})")
        if not self.irreducible:
            said.append(
                f"no irreducible term: that takes {POINTS_FOR_E} points on the frontier that span a factor of "
                f"{SPAN_FOR_E:g} in x; extrapolate with care"
            )
        if self.prediction is not None:
            found, told = self.points[self.on_frontier[-1]], self.prediction
            said.append(
                f"the largest on the frontier, {found.name}: the others predict {told.y:.4g} ({told.low:.4g} to "
                f"{told.high:.4g}), found {found.y:.4g} ({found.y / told.y - 1:+.1%})"
            )
        return said

    def as_json(self) -> dict[str, Any]:
        """Return the results as --json writes them."""
        shown, told = set(self.on_frontier), self.prediction
        return {
            "x": self.x,
            "y": self.y,
            "points": [
                {**vars(point), "on_frontier": row in shown, "fit": float(self.fit.law(point.x))}
                for row, point in enumerate(self.points)
            ],
            "law": vars(self.fit.law),
            "interval": self.fit.interval,
            "level": LEVEL,
            "irreducible": self.irreducible,
            "prediction_of_largest": None if told is None else vars(told),
        }


def fit_points(points: list[Point], *, x: str, y: str, shifted: bool) -> ScalingFit:
    """Return the law through the frontier of points. Raises UsageError when there are too few of them."""
    xs, ys = (np.array([getattr(point, axis) for point in points]) for axis in ("x", "y"))
    rows = frontier(xs, ys)
    if len(rows) < FEWEST_POINTS:
        raise UsageError(
            f"{len(rows)} of {len(points)} points are on the frontier of {y} against {x} (better than all with less); "
            f"a fit takes {FEWEST_POINTS}: add runs that get better with {x}"
        )
    irreducible = has_irreducible_term(xs[rows])
    law = fit(xs[rows], ys[rows], irreducible=irreducible, shifted=shifted)
    prediction = None
    if len(rows) > FEWEST_POINTS + irreducible + shifted:
        last, others = rows[-1], rows[:-1]
        told = fit(xs[others], ys[others], irreducible=irreducible, shifted=shifted and len(others) >= POINTS_FOR_SHIFT)
        low, high = told.band_of_a_point(xs[last])
        prediction = Prediction(float(xs[last]), float(told.law(xs[last])), low, high)
    return ScalingFit(x, y, points, rows.tolist(), irreducible, law, prediction)


def publish(found: ScalingFit, folder: Path, sweep: MlflowSweep) -> None:
    """Draw the fit into the folder of its runs, and show it with its points on the sweep's parent run in MLflow."""
    name = f"fit_{found.x}_{found.y.replace('/', '_')}"
    draw(found, folder / f"{name}.png")
    rows: list[dict[str, Any]] = found.as_json()["points"]
    sweep.add([folder / f"{name}.png"], {f"{name}_table.json": {key: [row[key] for row in rows] for key in rows[0]}})


def draw(found: ScalingFit, path: Path) -> None:
    """Draw the points and the law. Raises UsageError when the file cannot be written."""
    shown = set(found.on_frontier)
    drawn = [Drawn(point.size, point.x, point.y, row in shown) for row, point in enumerate(found.points)]
    labels = AXES[found.x][0], found.y_label, found.formula.replace(" x^", f" {found.x}^")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scaling_fit_figure(drawn, found.fit, found.prediction, path, labels=labels)
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written: {error.strerror}") from None
