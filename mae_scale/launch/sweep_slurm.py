"""`mae-scale sweep --slurm`: each run of a grid as a job, with the transfer that follows it as the next of a chain."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

from data_pipeline.errors import EXIT_DONE, UsageError
from data_pipeline.files import write_json
from mae_scale.launch.grid import GridPoint
from mae_scale.launch.slurm import (
    NO_SLURM,
    Link,
    Place,
    Shape,
    check_partitions,
    make_link,
    refuse_password,
    send,
    with_site,
    write,
)
from mae_scale.launch.slurm_queue import jobs_in_queue
from mae_scale.launch.slurm_templates import PROLOGUE, find_template
from mae_scale.launch.sweep import Step, Sweep, lacks_delivery, prepare_sweep, show, steps_of
from mae_scale.training.run_state import RUNNING, run_state

JOBS = "jobs.json"


def submit_sweep(sweep: Sweep, shape: Shape) -> int:
    """Send the runs that are not done and have no job in the queue; show the results so far. Return the exit code.

    Raises UsageError for what can be refused before anything is sent, RunError when sbatch refuses a job after all.
    """
    if shutil.which("sbatch") is None or shutil.which("squeue") is None:
        raise UsageError(NO_SLURM)
    sweep = replace(sweep, out=sweep.out.absolute())
    refuse_password(list(sweep.grid.common))
    prologue = find_template(PROLOGUE)
    shape = with_site(shape, prologue)
    chains: dict[str, list[Link]] = {}

    def check_point(point: GridPoint, steps: list[Step]) -> None:
        chains[point.name] = _chain(sweep, point, steps, shape)
        if len(chains) == 1:  # all points ask for the same
            check_partitions(chains[point.name])

    mlflow = prepare_sweep(sweep, check_point)
    kept = sweep.out / "slurm" / JOBS
    sent: dict[str, list[str]] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    queue, in_mlflow = jobs_in_queue(), mlflow.children()
    for point in sweep.grid.points():
        waiting = [f"job {job}: {queue[job]}" for job in sent.get(point.name, []) if job in queue]
        if waiting:
            print(f"{point.name}: {', '.join(waiting)}")
            continue
        left = [
            link
            for link, step in zip(chains[point.name], steps_of(sweep, point), strict=True)
            if _is_left(step, in_mlflow)
        ]
        if not left:
            print(f"{point.name}: done already")
            continue
        write(left, prologue)
        sent[point.name] = send(left)
        write_json(kept, sent)
    show(sweep, mlflow)
    return EXIT_DONE


def _is_left(step: Step, in_mlflow: dict[str, str] | None) -> bool:
    state = run_state(step.folder)
    return state != RUNNING and (not step.is_done(state) or lacks_delivery(step, in_mlflow))


def _chain(sweep: Sweep, point: GridPoint, steps: list[Step], shape: Shape) -> list[Link]:
    """Return the jobs of a point, each to start after the one before."""
    links: list[Link] = []
    recipes = [sweep.recipe, *([] if sweep.then is None else [sweep.then])]
    for recipe, step in zip(recipes, steps, strict=True):
        label = point.name if not links else f"{point.name}-then"
        place = Place(label, step.folder, sweep.out / "slurm" / label)
        links.append(make_link(recipe, list(step.overrides), shape, place, links))
    return links
