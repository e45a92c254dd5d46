"""`mae-scale sweep`: the runs of a grid, one after the other on this machine, each in its own folder."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, RunError, UsageError, reason_of
from data_pipeline.files import write_json
from data_pipeline.index import Index
from data_pipeline.index_build import open_index
from mae_scale.config.load import load_recipe
from mae_scale.config.schema import STARTING, Recipe
from mae_scale.distributed.ranks import launched
from mae_scale.launch.grid import Grid, GridPoint
from mae_scale.launch.local import launch_local_ranks
from mae_scale.launch.transfer_check import refuse_other_model, without_weights
from mae_scale.tasks.registry import task_of
from mae_scale.tasks.scaling_points import THEN
from mae_scale.tasks.sweep_results import SWEEP, read_results
from mae_scale.tracking.mlflow_state import mlflow_run_of
from mae_scale.tracking.mlflow_sweep import MlflowSweep, check_name
from mae_scale.tracking.mlflow_uri import tracking_uri
from mae_scale.training import schedule
from mae_scale.training.preflight import check, training_root
from mae_scale.training.run_state import DONE, RUNNING, STOPPED_EARLY, run_state


@dataclass(frozen=True)
class Sweep:
    """A grid over a recipe, the transfer that follows each of its runs, and the folder of the runs' folders."""

    recipe: str
    grid: Grid
    then: str | None
    out: Path
    name: str


@dataclass(frozen=True)
class Step:
    """A run of a sweep: its folder, its recipe, and the words after `mae-scale` that start it and go on with it."""

    folder: Path
    recipe: Recipe
    words: tuple[str, ...]
    overrides: tuple[str, ...]

    def is_done(self, state: str) -> bool:
        """Return whether a state is the run's end."""
        return state == DONE or (state == STOPPED_EARLY and self.recipe.schedule.stop_after_steps is not None)


def steps_of(sweep: Sweep, point: GridPoint) -> list[Step]:
    """Return a point's run, and the transfer that follows it. Raises UsageError for a recipe that cannot be loaded."""
    folder = sweep.out / point.name
    try:
        first = _step(sweep.recipe, folder, [*point.overrides, f"tracking.sweep={sweep.name}"])
        if sweep.then is None:
            return [first]
        section = STARTING[load_recipe(sweep.then).task]  # _check_transfer
        overrides = [*point.then_overrides, f"{section}.weights={folder}", f"tracking.sweep={sweep.name}"]
        overrides.append(f"tracking.run_name={point.name} {THEN} {sweep.then}")
        if first.recipe.tracking.uri is None and (uri := tracking_uri(None, folder)) is not None:
            overrides.append(f"tracking.uri={uri}")  # that of the sweep's folder, not of the point's
        return [first, _step(sweep.then, folder / THEN, overrides)]
    except UsageError as error:
        raise UsageError(f"{point.name}: {error}") from None


def prepare_sweep(sweep: Sweep, check_point: Callable[[GridPoint, list[Step]], None]) -> MlflowSweep:
    """Check all runs, write what the sweep is into its folder, and claim its name in MLflow.

    check_point: raises UsageError for what can be refused of a point.

    Raises UsageError for what can be refused before a run is started, a folder with another sweep, and a name that
    another sweep has.
    """
    check_name(sweep.name)
    _check_transfer(sweep)
    kept = _kept(sweep)
    first: Step | None = None
    for point in sweep.grid.points():
        steps = steps_of(sweep, point)
        first = first or steps[0]
        try:
            check_point(point, steps)
        except UsageError as error:
            raise UsageError(f"{point.name}: {error}") from None
    assert first is not None
    mlflow = MlflowSweep.of(first.recipe.tracking, sweep.out, sweep.name, kept["key"])
    try:
        sweep.out.mkdir(parents=True, exist_ok=True)
        mlflow.claim()
        write_json(sweep.out / SWEEP, kept)
    except OSError as error:
        raise UsageError(f"--out {sweep.out} cannot be written to: {error.strerror}") from None
    return mlflow


def run_sweep(sweep: Sweep, nproc: int) -> int:
    """Do the runs that are not done, one after the other; return the exit code: 75 when stopped, 1 when one failed.

    A run that fails does not keep the others from being done. Raises what prepare_sweep() raises.
    """
    if launched():
        raise UsageError("sweep starts its ranks itself; over nodes add --slurm on a login node")
    images: dict[Path, Index] = {}
    mlflow = prepare_sweep(sweep, lambda _, steps: _check(steps, nproc, images))
    in_mlflow = mlflow.children()
    points, failed = list(sweep.grid.points()), EXIT_DONE
    for number, point in enumerate(points, start=1):
        print(f"[{number}/{len(points)}] {point.name}", flush=True)
        for step in steps_of(sweep, point):
            code = _run(step, nproc, in_mlflow)
            if code in (EXIT_STOPPED, EXIT_INTERRUPTED):
                return code
            failed = failed or code
            if not step.is_done(run_state(step.folder)):
                break
    show(sweep, mlflow)
    return failed


def show(sweep: Sweep, mlflow: MlflowSweep) -> None:
    """Print the results, draw them, and put them on the sweep's page in MLflow."""
    results = read_results(sweep.out)
    print("\n".join(results.lines()))
    for path in results.write():
        print(path)
    mlflow.publish(results.page())


def _step(recipe: str, folder: Path, overrides: list[str]) -> Step:
    loaded = load_recipe(recipe, overrides)
    command = task_of(loaded, folder).command
    return Step(folder, loaded, (command, recipe, "--out", str(folder), *overrides), tuple(overrides))


def _check_transfer(sweep: Sweep) -> None:
    """Raise UsageError for a transfer that is none, or settings for a transfer that there is not."""
    if sweep.then is None and sweep.grid.then:
        raise UsageError(f"then.{sweep.grid.then[0]} is for a transfer after each run; add --then RECIPE")
    if sweep.then is not None and load_recipe(sweep.then).task not in STARTING:
        raise UsageError(
            f"--then {sweep.then} does not start from weights; expected a classifier, such as probe/vit_base, a "
            "detector or a segmenter"
        )


def _check(steps: list[Step], ranks: int, images: dict[Path, Index]) -> None:
    """Raise UsageError for what can be refused before a point is started. images: the folders read so far."""
    for step in steps:
        root = training_root(step.recipe)
        if root not in images:
            images[root] = open_index(root, step.recipe.data.index)
        chosen = task_of(step.recipe, step.folder).choose_images(images[root])
        schedule.steps_of(step.recipe, len(chosen))  # refuses a batch larger than the data
    first, *others = steps
    check(task_of(first.recipe, first.folder), ranks)
    for step in others:
        refuse_other_model(first.folder.name, first.recipe, step.recipe)
        trained = first.is_done(run_state(first.folder))
        check(task_of(step.recipe if trained else without_weights(step.recipe), step.folder), ranks)


def _run(step: Step, nproc: int, in_mlflow: dict[str, str] | None) -> int:
    """Start a run or go on with it, unless it is done and delivered, or at work elsewhere; return its exit code."""
    state = run_state(step.folder)
    if state == RUNNING:
        print(f"{step.folder}: at work elsewhere, left alone")
        return EXIT_DONE
    if step.is_done(state):
        if not lacks_delivery(step, in_mlflow):
            print(f"{step.folder}: done already")
            return EXIT_DONE
        print(f"{step.folder}: done already; MLflow gets what it lacks")
    try:
        return launch_local_ranks(nproc, list(step.words))
    except RunError as error:
        print(f"{step.folder}: {error}", file=sys.stderr)
        return EXIT_FAILED


def lacks_delivery(step: Step, in_mlflow: dict[str, str] | None) -> bool:
    """Return whether MLflow, which has the runs of these states, lacks a run that is done, or its end."""
    return in_mlflow is not None and in_mlflow.get(mlflow_run_of(step.folder) or "") != "FINISHED"


def _kept(sweep: Sweep) -> dict[str, Any]:
    """Return what the sweep's folder keeps of it, with the points of earlier calls.

    Raises UsageError when the folder holds another sweep.
    """
    grid, path = sweep.grid, sweep.out / SWEEP
    meant: dict[str, Any] = {
        "name": sweep.name,
        "recipe": sweep.recipe,
        "overrides": list(grid.common),
        "then": sweep.then,
        "then_overrides": list(grid.then),
        "axes": [list(axis.keys) for axis in grid.axes],
    }
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {**meant, "key": uuid.uuid4().hex}
        points = {**found.get("points", {}), **{point.name: point.values for point in grid.points()}}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"{path} cannot be read ({reason_of(error)}); choose another --out") from None
    different = [f"{key}: {found.get(key)} -> {value}" for key, value in meant.items() if found.get(key) != value]
    if different:
        raise UsageError(f"--out {sweep.out} holds another sweep ({'; '.join(different)}); choose another --out")
    return {**found, "points": points}
