"""Folders of runs, read for people: what each run is, how far it came, what it measured, what has happened to it.

Whatever a folder lacks, or has damaged, is left out and said: one bad file must not hide a thousand runs.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UsageError
from mae_scale.checkpoints.store import Damaged, list_checkpoints, read_manifest
from mae_scale.config.load import stored_recipe, yaml_text
from mae_scale.config.schema import Recipe
from mae_scale.models.build import size_of
from mae_scale.reports.page_content import Curve, Event, PageRun
from mae_scale.reports.page_curves import METRICS, POINTS, curve_of, is_largest, thinned
from mae_scale.tasks.registry import task_of
from mae_scale.tasks.scaling_points import THEN
from mae_scale.tracking.metrics_log import parse_rows
from mae_scale.training.event_log import CLOSING
from mae_scale.training.inputs import RECIPE
from mae_scale.training.planned import MEASURED, TAKEN, over_plan
from mae_scale.training.run_lock import seems_held

NOT_RUNS = ("mlartifacts", "mlruns", "checkpoints", "export", "figures", THEN)
DEPTH = 2
"""Folders of runs may lie in a folder each, as sweeps do."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast


@dataclass(frozen=True)
class FoundRun:
    """A run's folder, and its name beside others."""

    name: str
    folder: Path


def find_runs(folders: Sequence[Path]) -> list[FoundRun]:
    """Return the runs in folders: each is a run's, or holds those of runs; a transfer lies in RUN/then.

    Raises UsageError when a folder is not there, cannot be read, or has no run.
    """
    found: dict[Path, FoundRun] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}")
        try:
            runs = list(_runs_in(folder, DEPTH))
        except OSError as error:
            raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from None
        if not runs:
            raise UsageError(
                f"{folder} has no run; expected a run's folder, with its {RECIPE}, or a folder of such folders"
            )
        base = folder.resolve()
        for path in runs:
            below = path.relative_to(folder)
            is_run = (folder / RECIPE).is_file()
            name = Path(base.name) / below if is_run or len(folders) > 1 else below
            found.setdefault(path.resolve(), FoundRun(str(name), path))
    return list(found.values())


def _runs_in(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / RECIPE).is_file():
        yield folder
        if (folder / THEN / RECIPE).is_file():
            yield folder / THEN
    elif depth:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and child.name not in NOT_RUNS and not child.name.startswith("."):
                yield from _runs_in(child, depth - 1)


def read_run(found: FoundRun) -> PageRun:
    """Return what the folder of a run tells."""
    folder, notes = found.folder, list[str]()
    recipe, kind = _recipe(folder, notes)
    rows = [row for row in _rows(folder / "metrics.jsonl", notes) if _is_number(row.get("epoch"))]
    events = [row for row in _rows(folder / "events.jsonl", notes) if isinstance(row.get("event"), str)]
    epochs = recipe.schedule.epochs if recipe else None
    done = float(rows[-1]["epoch"]) if rows else None
    state, reason = _state(events, folder, is_complete=None not in (done, epochs) and done >= epochs)  # type: ignore[operator]
    return PageRun(
        name=found.name,
        kind=kind,
        encoder=_encoder(recipe, notes),
        seed=recipe.seed if recipe else None,
        epochs_done=done,
        epochs=epochs,
        state=state,
        reason=reason,
        values=last_values(rows),
        duration_s=_duration(events, rows, goes_on=state == "running"),
        curves=curves_of(rows),
        events=_events(events, rows, is_running=state == "running"),
        environment=_environment(folder, events),
        recipe={key: yaml_text(value) for key, value in recipe.flat().items()} if recipe else {},
        notes=notes,
    )


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl file; a missing file has none, and what is damaged is left out with a note."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    rows = [row for line, row in parse_rows(content) if row is not None or line]
    kept = [row for row in rows if row is not None]
    if len(kept) < len(rows):
        notes.append(f"{path.name} has {len(rows) - len(kept)} damaged line(s), which are left out")
    return kept


def _recipe(folder: Path, notes: list[str]) -> tuple[Recipe | None, str]:
    """Return a run's recipe, and the kind of its training; None and what can be told where it cannot be read."""
    tree: Any = None
    try:
        tree = yaml.load((folder / RECIPE).read_bytes(), LOADER)
        if not isinstance(tree, dict):
            raise UsageError(f"holds {type(tree).__name__}, expected sections such as model:")
        recipe = stored_recipe(tree, RECIPE)
        return recipe, task_of(recipe, folder).kind
    except OSError as error:
        notes.append(f"{RECIPE} cannot be read: {error.strerror}")
    except yaml.YAMLError:
        notes.append(f"{RECIPE} is damaged: it is not valid YAML")
    except UsageError as error:
        notes.append(f"{RECIPE} is not understood: {str(error).removeprefix(f'recipe {RECIPE}: ')}")
    task = tree.get("task") if isinstance(tree, dict) else None
    return None, task if isinstance(task, str) else "unknown"


def _encoder(recipe: Recipe | None, notes: list[str]) -> str:
    """Return the encoder's name, else its width x blocks."""
    if recipe is None:
        return ""
    try:
        size = size_of(recipe.model)
    except UsageError as error:
        notes.append(str(error))
        return recipe.model.name or ""
    return recipe.model.name or f"{size.width}x{size.depth}"


def curves_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Return the metrics of a run's rows that a page draws, of as many points as it can show."""
    found = {}
    for metric in METRICS:
        points = [(row["epoch"], row[metric]) for row in rows if isinstance(row.get(metric), int | float)]
        if points:
            found[metric] = thinned(curve_of(points), POINTS[0], largest=is_largest(metric))
    return found


def last_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the values to compare runs by: the mean training loss of the last epoch begun, the median rate, what the
    newest start was planned to take and has taken, else the last value.
    """
    values: dict[str, float] = {}
    for row in rows:
        values.update((name, value) for name, value in row.items() if name.startswith("val/") and _is_number(value))
    if not rows:
        return values
    newest = math.ceil(rows[-1]["epoch"]) - 1
    losses = [row["train/loss"] for row in rows if row["epoch"] > newest and _is_number(row.get("train/loss"))]
    rates = [row["perf/images_per_second"] for row in rows if _is_number(row.get("perf/images_per_second"))]
    if losses:
        values["train/loss"] = statistics.fmean(losses)
    if rates:
        values["perf/images_per_second"] = statistics.median(rates)
    whole = [row for row in rows if all(_is_number(row.get(name)) for name in MEASURED)]
    for planned, (plan, took) in over_plan(whole).items():
        values |= {planned: plan, TAKEN[planned]: took}
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _state(events: Sequence[Mapping[str, Any]], folder: Path, *, is_complete: bool) -> tuple[str, str]:
    """Return in a word how the newest start stands, and why."""
    marks = [row for row in events if row["event"] in ("start", *CLOSING)]
    if not marks:
        return ("done", "") if is_complete else ("not started", "")
    event, reason = marks[-1]["event"], str(marks[-1].get("reason", ""))
    if event == "start":
        return "running" if seems_held(folder) else "done" if is_complete else "killed", ""
    if event == "end":
        return "done" if is_complete or reason == "done" else "stopped early", ""
    return {"stop": "stopped", "failure": "failed"}[event], reason


@dataclass(frozen=True)
class _Start:
    """A start: its event, the one that closes it, and the time of the last thing that is known of it."""

    row: Mapping[str, Any]
    closing: Mapping[str, Any] | None
    last: Mapping[str, Any]


def _starts(events: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[_Start]:
    begins = [number for number, row in enumerate(events) if row["event"] == "start"]
    found = []
    for begin, end in pairwise([*begins, len(events)]):
        own = events[begin:end]
        until = events[end]["time"] if end < len(events) else math.inf
        closing = next((row for row in own if row["event"] in CLOSING), None)
        logged = [row for row in rows if own[0]["time"] <= row["time"] < until]
        last = max([own[-1], *logged[-1:]], key=lambda row: row["time"])
        found.append(_Start(own[0], closing, closing or last))
    return found


def _duration(events: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], *, goes_on: bool) -> float | None:
    """Return the seconds of all starts together; of one that was killed to the last thing that it has noted."""
    starts = _starts(events, rows)
    if not starts:
        return rows[-1]["time"] - rows[0]["time"] if len(rows) > 1 else None
    return float(sum(max(0.0, start.last["time"] - start.row["time"]) for start in starts))


def _events(events: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], *, is_running: bool) -> list[Event]:
    """Return the events of a run in order, and after each start that nothing closes that it was killed."""
    found = [Event(row["time"], row["step"], row["event"], _words(row)) for row in events]
    starts = _starts(events, rows)
    for start in starts[: -1 if is_running else None]:
        if start.closing is None:
            step = int(start.last["step"])
            said = "no end of this start was noted: the process, its node or its job was killed"
            found.append(Event(start.last["time"], step, "killed", said))
    return sorted(found, key=lambda event: event.time or 0.0)


def _words(row: Mapping[str, Any]) -> str:
    """Return what an event says beside its kind."""
    if row["event"] == "start":
        ranks = row.get("world_size", "?")
        where = f" on {row['host']}" if row.get("host") else ""
        return f"{ranks} rank{'s' if ranks != 1 else ''}{where}, {row.get('engine', '')}".rstrip(", ")
    words = [str(row[key]) for key in ("kind", "reason") if row.get(key)]
    if row.get("skipped_batches"):
        words.append(f"{row['skipped_batches']} batches skipped")
    return ": ".join(words)


def _environment(folder: Path, events: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return what the newest start has run on: of its event, of engine.json and of the newest checkpoint."""
    begins = [row for row in events if row["event"] == "start"]
    start = begins[-1] if begins else {}
    manifest: Mapping[str, Any] = {}
    if not isinstance(start.get("versions"), dict):
        for _, checkpoint in list_checkpoints(folder / "checkpoints")[-1:]:
            with contextlib.suppress(Damaged):
                manifest = read_manifest(checkpoint)
    used: Any = {}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        used = json.loads((folder / "engine.json").read_bytes()).get("used", {})
    versions = start.get("versions") or manifest.get("versions")
    facts = {
        **{key: start.get(key) for key in ("host", "device", "slurm_job_id", "git_commit", "python")},
        "ranks": start.get("world_size"),
        "engine": start.get("engine"),
        "precision": used.get("engine.precision") if isinstance(used, dict) else None,
        **(versions if isinstance(versions, dict) else {}),
    }
    return {key.replace("_", " "): str(value) for key, value in facts.items() if value is not None}
