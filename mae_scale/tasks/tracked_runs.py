"""The runs of an MLflow experiment as the page of `mae-scale report` shows them: what MLflow has of them."""

from __future__ import annotations

import math

from mae_scale.reports.page_content import Curve, Event, PageRun
from mae_scale.reports.page_curves import METRICS, POINTS, curve_of, is_largest, thinned
from mae_scale.tracking.mlflow_experiment import TrackedRun, read_experiment

MOST_WITH_CURVES = 200
"""MLflow takes a request per run and metric: of more runs the newest have curves, the others their newest values."""
WARNING_TAG = "mae_scale.warning."
STATES = {"RUNNING": "running", "FINISHED": "done", "FAILED": "failed", "KILLED": "stopped", "SCHEDULED": "not started"}
FACTS = ("host", "device", "slurm_job_id", "git_commit", "world_size", "engine")


def runs_of_experiment(uri: str, name: str, *, most: int) -> tuple[list[PageRun], list[str]]:
    """Return the runs of an experiment, the newest first, and notes. Raises UsageError as read_experiment does."""
    found = read_experiment(uri, name, [*METRICS, "epoch"], histories_of=MOST_WITH_CURVES, most=most)
    notes = ["events and reconstructions lie in the runs' folders: report on these to see them"]
    if len(found) > MOST_WITH_CURVES:
        notes.append(f"curves are those of the newest {MOST_WITH_CURVES} of {len(found):,} runs: folders have all")
    names = [run.name for run in found]
    return [_page_run(run, unique=names.count(run.name) == 1) for run in found], notes


def _page_run(run: TrackedRun, *, unique: bool) -> PageRun:
    done, epochs = run.values.get("epoch"), _whole(run.params.get("schedule.epochs"))
    state = STATES.get(run.status, run.status.lower())
    if state == "done" and done is not None and epochs is not None and done < epochs:
        state = "stopped early"
    warnings = [
        Event(None, 0, "warning", f"{tag.removeprefix(WARNING_TAG)}: {words}")
        for tag, words in run.tags.items()
        if tag.startswith(WARNING_TAG)
    ]
    versions = {tag.removeprefix("version."): value for tag, value in run.tags.items() if tag.startswith("version.")}
    return PageRun(
        name=run.name if unique else f"{run.name} ({run.run_id[:8]})",
        kind=run.tags.get("mae_scale.task") or run.params.get("task", "unknown"),
        encoder=_encoder(run.params),
        seed=_whole(run.params.get("seed")),
        epochs_done=done,
        epochs=epochs,
        state=state,
        values=run.values,
        duration_s=run.duration_s,
        curves=_curves(run),
        events=warnings,
        environment={tag.replace("_", " "): run.tags[tag] for tag in FACTS if tag in run.tags} | versions,
        recipe=run.params,
    )


def _curves(run: TrackedRun) -> dict[str, Curve]:
    """Return the curves by epoch, which is proportional to the step."""
    epochs = run.histories.get("epoch", [])
    last = next(((step, epoch) for step, epoch in reversed(epochs) if step and math.isfinite(epoch)), None)
    if last is None:
        return {}
    per_step = last[1] / last[0]
    found = {}
    for metric, points in run.histories.items():
        if metric in METRICS:
            curve = curve_of((step * per_step, value) for step, value in points)
            found[metric] = thinned(curve, POINTS[0], largest=is_largest(metric))
    return found


def _encoder(params: dict[str, str]) -> str:
    name = params.get("model.name", "None")
    if name != "None":
        return name
    width, depth = params.get("model.width", "?"), params.get("model.depth", "?")
    return f"{width}x{depth}" if width != "?" else ""


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
