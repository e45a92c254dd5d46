"""Runs that need each other: done some side by side, each a process of its own; what is done is left as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import EXIT_STOPPED, RunError, UsageError
from mae_scale.config.load import load_recipe
from mae_scale.config.schema import Recipe
from mae_scale.launch.local import launch_local_ranks
from mae_scale.tasks.registry import task_of
from mae_scale.training.preflight import check
from mae_scale.training.run_state import DONE, run_state


@dataclass(frozen=True)
class Run:
    """A run: its name, the arguments after `mae-scale` that start it on its ranks, and the names of those it needs."""

    name: str
    folder: Path
    arguments: tuple[str, ...]
    needs: tuple[str, ...]
    ranks: int = 1

    def recipe(self) -> Recipe:
        """Return its recipe, loaded. Raises UsageError when it cannot be."""
        return load_recipe(self.arguments[1], self.arguments[4:])


def check_runs(runs: Sequence[Run]) -> None:
    """Raise UsageError when a run could not be started, as far as that can be told before those it needs are done."""
    for run in runs:
        try:
            recipe = run.recipe()
            if not run.needs:
                check(task_of(recipe, run.folder), 1)
        except UsageError as error:
            raise UsageError(f"{run.name}: {error}") from None


def do(runs: Sequence[Run], jobs: int, told: Callable[[Run], None]) -> None:
    """Do the runs that are not done, up to `jobs` side by side, each after those that it needs.

    told: called after each run. Raises RunError when a run fails, once those at work have ended;
    SystemExit with 75 when asked to stop, once they are saved.
    """
    with ThreadPoolExecutor(jobs) as pool:
        waiting = list(runs)
        done: set[str] = set()
        at_work: dict[Future[None], Run] = {}
        try:
            while waiting or at_work:
                for run in [run for run in waiting if done.issuperset(run.needs)][: jobs - len(at_work)]:
                    waiting.remove(run)
                    at_work[pool.submit(_do, run)] = run
                for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                    run = at_work.pop(future)
                    future.result()
                    done.add(run.name)
                    told(run)
        finally:
            pool.shutdown(cancel_futures=True)


def _do(run: Run) -> None:
    """Do a run, with what it prints in a file beside its folder."""
    if run_state(run.folder) == DONE:
        return
    log = run.folder.with_name(run.folder.name + ".log")
    code = launch_local_ranks(run.ranks, list(run.arguments), log=log)
    if code == EXIT_STOPPED:
        raise SystemExit(code)
    if code:
        last = " / ".join(log.read_text(encoding="utf-8").strip().splitlines()[-3:])
        raise RunError(f"{run.name} ended with exit code {code}: {last} (all in {log})")
