"""`mae-scale scaling run`: the first steps of a recipe on several numbers of local ranks, one after the other."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, RunError, UsageError
from data_pipeline.files import write_json
from mae_scale.config.load import load_recipe
from mae_scale.distributed.ranks import launched
from mae_scale.engines.policy import layout_of
from mae_scale.launch.local import launch_local_ranks
from mae_scale.tasks.registry import task_of
from mae_scale.tasks.throughput import read_throughput
from mae_scale.training.preflight import check

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
        ]

    def folder_of(self, ranks: int) -> Path:
        """Return a point's folder."""
        return self.out / f"ranks_{ranks:04d}"


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
    _refuse_another(sweep)
    command = ""
    for ranks in sweep.ranks:
        recipe = load_recipe(sweep.recipe, sweep.overrides_of(ranks))
        task = task_of(recipe, sweep.folder_of(ranks))
        layout_of(recipe, ranks)
        check(task, ranks)
        command = task.command
    _remember(sweep)
    failed = EXIT_DONE
    for ranks in sweep.ranks:
        folder = sweep.folder_of(ranks)
        if _is_done(sweep, folder):
            print(f"{folder}: measured already")
            continue
        words = [command, sweep.recipe, "--out", str(folder), *sweep.overrides_of(ranks)]
        try:
            code = launch_local_ranks(ranks, words)
        except RunError as error:
            print(f"{folder}: {error}", file=sys.stderr)
            code = EXIT_FAILED
        if code in (EXIT_STOPPED, EXIT_INTERRUPTED):
            return code
        failed = failed or code
    return failed


def _is_done(sweep: ThroughputSweep, folder: Path) -> bool:
    if not (folder / "events.jsonl").exists():
        return False
    return any(point.name == folder.name and point.state == "done" for point in read_throughput(sweep.out))


def _content(sweep: ThroughputSweep) -> dict[str, object]:
    """Return what the sweep's folder keeps of it."""
    kind = "weak" if sweep.weak else "strong"
    return {"recipe": sweep.recipe, "overrides": sweep.overrides, "kind": kind, "steps": sweep.steps}


def _refuse_another(sweep: ThroughputSweep) -> None:
    """Raise UsageError when the folder has measured something else."""
    path, meant = sweep.out / SWEEP, _content(sweep)
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else meant
    different = [f"{key}: {found.get(key)} -> {value}" for key, value in meant.items() if found.get(key) != value]
    if different:
        raise UsageError(f"--out {sweep.out} holds another sweep ({'; '.join(different)}); choose another --out")


def _remember(sweep: ThroughputSweep) -> None:
    """Write what is measured into the folder."""
    try:
        sweep.out.mkdir(parents=True, exist_ok=True)
        write_json(sweep.out / SWEEP, _content(sweep))
    except OSError as error:
        raise UsageError(f"--out {sweep.out} cannot be written to: {error.strerror}") from None
