"""The points of a throughput sweep: what the folder of a short run tells of its rate, and how the run has ended."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe
from mae_scale.config.schema import differing_keys
from mae_scale.tracking.metrics_log import after_warm_up, parse_rows, read_metrics
from mae_scale.training.planned import STEP_TIME

NAME = re.compile(r"(?:ranks|nodes)_(\d+)")
"""Name of a point's folder, with its number of ranks or nodes."""
RATES = ("perf/images_per_second", "perf/step_time_s", "perf/data_wait_s")
"""What a row must have to be counted."""
ACTIVE = ("queued", "running")
"""First words of the states in which a point will be measured without anyone's doing."""
RUNNING = "running or killed"


@dataclass(frozen=True)
class Measured:
    """What a point has measured: medians over its logged intervals after the warm-up, and quartiles of the rate."""

    images_per_second: float
    quartiles: tuple[float, float]
    step_time_s: float
    """Without saving, which is beside it."""
    data_wait_s: float
    intervals: int
    micro_batch: int | None
    device: str | None
    """cpu or cuda; None where the run did not write it."""
    checkpoint_s: float | None
    """Time that a save has held training, per step between two saves of the recipe; None before the point's end."""
    planned_step_time_s: float | None
    """What its start was planned to take; None where it was not."""

    @property
    def global_batch(self) -> int:
        return round(self.images_per_second * self.step_time_s)


@dataclass(frozen=True)
class ThroughputPoint:
    """A short run on some ranks."""

    name: str
    ranks: int | None
    """None before it has started."""
    state: str
    """done, queued, running (or killed), cancelled, or why it failed."""
    measured: Measured | None

    @property
    def is_local(self) -> bool:
        """True for ranks that share a machine which has fewer of them at other points (`scaling run`)."""
        return self.name.startswith("ranks_")

    @property
    def number(self) -> int:
        """Number of ranks or nodes in the name."""
        return int(NAME.fullmatch(self.name)[1])  # type: ignore[index]  # read_points takes no other names


def read_points(folder: Path, outside: Mapping[str, str]) -> list[ThroughputPoint]:
    """Return the points of FOLDER, by number of ranks or nodes.

    outside: states, by name, of points as they are known outside of their folders: by whoever is to run them. Raises
    UsageError when there is none, or when they are of different recipes.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; expected the folder of `mae-scale scaling run` or slurm/scaling.sbatch")
    found = [_point(path.parent) for path in folder.glob("*/events.jsonl") if NAME.fullmatch(path.parent.name)]
    points = {point.name: point for point in found}
    _refuse_mixed(folder, sorted(points))
    for name, state in outside.items():
        known = points.get(name, ThroughputPoint(name, None, "", None))
        points[name] = ThroughputPoint(name, known.ranks, _joined(known.state, state), known.measured)
    if not points:
        raise UsageError(
            f"{folder} has no points: no folders of runs that have started, and none is queued; expected what "
            "`mae-scale scaling run` or slurm/scaling.sbatch leaves, such as ranks_0002 or nodes_0016"
        )
    return sorted(points.values(), key=lambda point: (point.number, point.name))


def _joined(told: str, outside: str) -> str:
    """Return the state of a point from what its folder tells ("" before it has started) and what is known outside.

    What is queued or runs may have failed before; how a run has ended it tells best itself, unless it was killed.
    """
    if told == "done":
        return told
    if outside.startswith(ACTIVE) or told in ("", RUNNING):
        return outside
    return f"{told} (cancelled)" if outside == "cancelled" else told


def _refuse_mixed(folder: Path, names: list[str]) -> None:
    """Raise UsageError when points differ in more than the global batch: their rates say nothing of each other."""
    recipes = {name: path for name in names if (path := folder / name / "recipe.yaml").exists()}
    first = None
    for name, path in recipes.items():
        recipe = load_recipe(str(path))
        first = first or (name, recipe)
        keys = [key for key in differing_keys(first[1], recipe) if not key.startswith("data.global_batch:")]
        if keys:
            raise UsageError(
                f"{folder} holds points of different recipes ({first[0]} and {name}: {'; '.join(keys)}); measure each "
                "recipe into a folder of its own"
            )


def _point(folder: Path) -> ThroughputPoint:
    events = [row for _, row in parse_rows((folder / "events.jsonl").read_bytes()) if row is not None]
    starts = [row for row in events if row["event"] == "start"]
    ranks = int(starts[-1]["world_size"]) if starts else None
    last = events[-1] if events else {"event": "start"}
    state = {"end": "done", "stop": "stopped", "failure": f"failed: {last.get('reason')}"}.get(last["event"], RUNNING)
    return ThroughputPoint(folder.name, ranks, state, _measured(folder, events) if ranks else None)


def _measured(folder: Path, events: list[dict[str, Any]]) -> Measured | None:
    """Return what a run has measured after its warm-up; None before that."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if all(_is_number(row.get(name)) for name in RATES)]
    kept = after_warm_up(rows)
    if not kept:
        return None
    low, median, high = np.quantile([row["perf/images_per_second"] for row in kept], (0.25, 0.5, 0.75)).tolist()
    step_time, data_wait = (
        float(np.median([row[name] for row in kept])) for name in ("perf/step_time_s", "perf/data_wait_s")
    )
    return Measured(
        images_per_second=median,
        quartiles=(low, high),
        step_time_s=step_time,
        data_wait_s=data_wait,
        intervals=len(kept),
        micro_batch=_micro_batch(folder),
        device=next((row.get("device") for row in reversed(events) if row["event"] == "start"), None),
        checkpoint_s=_checkpoint_s(events),
        planned_step_time_s=next((row[STEP_TIME] for row in reversed(rows) if _is_number(row.get(STEP_TIME))), None),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _micro_batch(folder: Path) -> int | None:
    """Return the micro-batch that the run has used; None where it is not written."""
    try:
        used = json.loads((folder / "engine.json").read_text(encoding="utf-8"))["used"]
        return int(used["engine.micro_batch"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checkpoint_s(events: list[dict[str, Any]]) -> float | None:
    """Return the time that saving costs a step; None where no start has told it."""
    ends = [row for row in events if "save_stall_s" in row]
    return ends[-1]["save_stall_s"] / ends[-1]["steps_per_save"] if ends else None
