"""`mae-scale scaling run`: the first steps of a recipe on several numbers of local ranks, one after the other."""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    RunError,
    UsageError,
    reason_of,
)
from data_pipeline.files import write_json
from mae_scale.config.load import load_recipe
from mae_scale.config.sections import TrackingSection
from mae_scale.distributed.ranks import launched
from mae_scale.engines.policy import layout_of
from mae_scale.launch.local import launch_local_ranks
from mae_scale.tasks.registry import task_of
from mae_scale.tasks.throughput_page import publish
from mae_scale.tasks.throughput_points import read_points
from mae_scale.tracking.mlflow_state import mlflow_run_of
from mae_scale.tracking.mlflow_sweep import MlflowSweep, check_name
from mae_scale.training.preflight import check, check_images

SWEEP = "scaling.json"
INTERVALS = 10
"""Logged intervals of a point, over which its medians are taken."""


@dataclass(frozen=True)
class ThroughputSweep:
    """A recipe with its overrides, to be run for some steps on some numbers of ranks, below `out`."""

    recipe: str
    overrides: list[str]
    ranks: list[int]
    weak: bool
    steps: int
    out: Path
    name: str
    """In MLflow."""

    def overrides_of(self, ranks: int) -> list[str]:
        """Return a point's overrides; with weak scaling the recipe's global batch is that of the fewest ranks."""
        found = list(self.overrides)
        if self.weak:
            batch = load_recipe(self.recipe, self.overrides).data.global_batch
            found.append(f"data.global_batch={batch * ranks // min(self.ranks)}")
        return [
            *found,
            f"schedule.stop_after_steps={self.steps}",
            f"tracking.log_every_steps={max(1, self.steps // INTERVALS)}",
            f"tracking.sweep={self.name}",
        ]

    def folder_of(self, ranks: int) -> Path:
        """Return a point's folder."""
        return self.out / point_name(ranks)


def ranks_of(text: str) -> list[int]:
    """Return the numbers of ranks in "1,2,4", ascending. Raises UsageError for anything else."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise UsageError(f"--ranks {text}: expected numbers of ranks, such as 1,2,4")
    return sorted({int(word) for word in words})


def run_sweep(sweep: ThroughputSweep) -> int:
    """Run the points that are not done yet; return the exit code: 75 when stopped, 1 when a point has failed.

    A point that fails does not keep the others from being measured. Raises UsageError for what can be refused before a
    point is started, or a folder with another sweep.
    """
    if launched():
        raise UsageError("scaling run starts its ranks itself; over nodes use slurm/scaling.sbatch")
    check_name(sweep.name)
    _refuse_another(sweep)
    tasks = []
    for ranks in sweep.ranks:
        recipe = load_recipe(sweep.recipe, sweep.overrides_of(ranks))
        task = task_of(recipe, sweep.folder_of(ranks))
        layout_of(recipe, ranks)
        check(task, ranks)
        tasks.append(task)
    check_images(tasks[0])  # of the fewest ranks: a global batch too large for the images is that point's alone
    mlflow = _claim(sweep, recipe.tracking)
    cores = _cores_per_rank(max(sweep.ranks))
    failed = EXIT_DONE
    for ranks in sweep.ranks:
        folder = sweep.folder_of(ranks)
        if _is_done(sweep, folder):
            if not mlflow.is_deleted(mlflow_run_of(folder)):
                print(f"{folder}: measured already")
                continue
            print(f"{folder}: its run was deleted in MLflow, so it is measured anew")
            shutil.rmtree(folder)
        words = [tasks[0].command, sweep.recipe, "--out", str(folder), *sweep.overrides_of(ranks)]
        try:
            code = launch_local_ranks(ranks, words, environment=cores)
        except RunError as error:
            print(f"{folder}: {error}", file=sys.stderr)
            code = EXIT_FAILED
        if code in (EXIT_STOPPED, EXIT_INTERRUPTED):
            return code
        failed = failed or code
    publish(read_points(sweep.out, planned(sweep.out)), sweep.out, mlflow)
    return failed


def planned(folder: Path) -> dict[str, str]:
    """Return {name: state} of the points that `scaling run` was asked for in FOLDER and that have not started."""
    ranks = _known(folder).get("ranks", [])
    names = [point_name(number) for number in ranks]
    return {name: "not measured yet" for name in names if not (folder / name / "events.jsonl").exists()}


def point_name(ranks: int) -> str:
    """Return the name of a point's folder."""
    return f"ranks_{ranks:04d}"


def _cores_per_rank(most: int) -> dict[str, str]:
    """Return the environment in which a rank computes on equally many cores at each point, those it has at the largest.

    Else one rank would have all cores of the machine, and efficiency would say nothing of scaling.
    """
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // most)
    return {"OMP_NUM_THREADS": str(threads)}


def _is_done(sweep: ThroughputSweep, folder: Path) -> bool:
    if not (folder / "events.jsonl").exists():
        return False
    return any(point.name == folder.name and point.state == "done" for point in read_points(sweep.out, {}))


def _content(sweep: ThroughputSweep) -> dict[str, Any]:
    """Return what is the same for all points of a sweep."""
    kind = "weak" if sweep.weak else "strong"
    return {
        "name": sweep.name,
        "recipe": sweep.recipe,
        "overrides": sweep.overrides,
        "kind": kind,
        "steps": sweep.steps,
    }


def _known(folder: Path) -> dict[str, Any]:
    """Return what a sweep's folder keeps of it, empty for a new one. Raises UsageError when it cannot be read."""
    path = folder / SWEEP
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {**found, "ranks": [int(ranks) for ranks in found.get("ranks", [])]}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"{path} cannot be read ({reason_of(error)}); choose another folder") from None


def _refuse_another(sweep: ThroughputSweep) -> None:
    """Raise UsageError when the folder has measured something else."""
    found, meant = _known(sweep.out), _content(sweep)
    different = [f"{key}: {found[key]} -> {value}" for key, value in meant.items() if found.get(key, value) != value]
    if different:
        raise UsageError(f"--out {sweep.out} holds another sweep ({'; '.join(different)}); choose another --out")
    if sweep.weak and found["ranks"] and min(found["ranks"]) != min(sweep.ranks):
        raise UsageError(
            f"--ranks {','.join(map(str, sweep.ranks))}: the weak sweep in {sweep.out} gives the recipe's global batch "
            f"to {min(found['ranks'])} ranks, its fewest; begin with as many, or choose another --out"
        )


def _claim(sweep: ThroughputSweep, tracking: TrackingSection) -> MlflowSweep:
    """Claim the sweep's name in MLflow, and write what is measured into the folder."""
    known = _known(sweep.out)
    key = known.get("key", uuid.uuid4().hex)
    mlflow = MlflowSweep.of(tracking, sweep.out, sweep.name, key)
    try:
        sweep.out.mkdir(parents=True, exist_ok=True)
        mlflow.claim()
        ranks = sorted({*known["ranks"], *sweep.ranks})
        write_json(sweep.out / SWEEP, {**_content(sweep), "ranks": ranks, "key": key})
    except OSError as error:
        raise UsageError(f"--out {sweep.out} cannot be written to: {reason_of(error)}") from None
    return mlflow
