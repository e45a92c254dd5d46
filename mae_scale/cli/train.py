"""The commands that train: `mae-scale pretrain`, `finetune`, `probe`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from data_pipeline.errors import EXIT_DONE, UsageError
from mae_scale.cli.json_file import Json, check_json, write_figures
from mae_scale.cli.options import (
    DryRun,
    LogFile,
    Nproc,
    Out,
    Overrides,
    Quiet,
    RecipeName,
    TrackingUri,
    Weights,
    can_be_stopped,
    check_folder_of,
    read_recipe,
    with_weights,
)
from mae_scale.cli.relaunch import relaunch, starts_ranks
from mae_scale.config.required import required
from mae_scale.distributed.ranks import launched, this_rank
from mae_scale.tracking.output import Output

if TYPE_CHECKING:
    from mae_scale.training.task import Task

train_app = typer.Typer()


@dataclass(frozen=True)
class Start:
    """The arguments of a command that trains."""

    command: str
    recipe: str
    overrides: list[str]
    out: Path
    nproc: int
    dry_run: bool
    output: Output
    json: Path | None = None


@train_app.command()
@can_be_stopped
def pretrain(
    recipe: RecipeName,
    out: Out,
    overrides: Overrides = None,
    nproc: Nproc = 1,
    tracking_uri: TrackingUri = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
) -> None:
    """Pre-train a masked autoencoder, BEiT, MoCo v3 or a tokeniser, as the recipe says.

    Example: `mae-scale pretrain demo --nproc 2 --out runs/demo data.root=digits/train`
    """
    overrides = _with_uri(overrides, tracking_uri)
    _train(Start("pretrain", recipe, overrides, out, nproc=nproc, dry_run=dry_run, output=Output(quiet, log_file)))


@train_app.command()
@can_be_stopped
def finetune(
    recipe: RecipeName,
    out: Out,
    overrides: Overrides = None,
    weights: Weights = None,
    nproc: Nproc = 1,
    tracking_uri: TrackingUri = None,
    json: Json = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
) -> None:
    """Train a classifier (end to end, its last blocks, its head alone, or from scratch), a detector or a segmenter.

    Example: `mae-scale finetune finetune/vit_huge_224 --weights runs/vit_huge --out runs/vit_huge_224
    data.root=/data/imagenet/train data.val_root=/data/imagenet/val`
    """
    overrides, output = _with_uri(with_weights(recipe, overrides, weights), tracking_uri), Output(quiet, log_file)
    _train(Start("finetune", recipe, overrides, out, nproc=nproc, dry_run=dry_run, output=output, json=json))


@train_app.command()
@can_be_stopped
def probe(
    recipe: RecipeName,
    out: Out,
    overrides: Overrides = None,
    weights: Weights = None,
    nproc: Nproc = 1,
    tracking_uri: TrackingUri = None,
    json: Json = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
) -> None:
    """Train a linear probe: the head alone, on a frozen encoder; `finetune` with a recipe of that kind.

    Example: `mae-scale probe probe/vit_large --weights runs/vit_large --out runs/vit_large_probe
    data.root=/data/imagenet/train data.val_root=/data/imagenet/val`
    """
    overrides, output = _with_uri(with_weights(recipe, overrides, weights), tracking_uri), Output(quiet, log_file)
    _train(Start("probe", recipe, overrides, out, nproc=nproc, dry_run=dry_run, output=output, json=json))


def _with_uri(overrides: list[str] | None, tracking_uri: str | None) -> list[str]:
    return [*(overrides or []), *([] if tracking_uri is None else [f"tracking.uri={tracking_uri}"])]


def _train(start: Start) -> NoReturn:
    """Check the start, and train as this rank, or on local ranks started here; end with the exit code."""
    check_json(start.json)
    check_folder_of("--log-file", start.output.log_file)
    with Output(start.output.quiet) if start.dry_run else start.output:
        code = _run(start, _task(start))
    raise typer.Exit(code)


def _run(start: Start, task: Task[Any]) -> int:
    if start.dry_run:
        return _say_plan(start, task)
    if starts_ranks(start.nproc):
        return _train_on_local_ranks(start, task)
    return _train_as_this_rank(start, task)


def _task(start: Start) -> Task[Any]:
    """Return the task of the recipe, checked. Raises UsageError when it is not one of the command's."""
    from mae_scale.tasks.classification.task import refuse_more_than_head
    from mae_scale.tasks.registry import task_for
    from mae_scale.training.preflight import check

    recipe = read_recipe(start.recipe, start.overrides)
    task = task_for("finetune" if start.command == "probe" else start.command, recipe, start.out)
    if start.command == "probe":
        refuse_more_than_head(recipe)
    if start.json is not None:
        required(
            recipe.data.val_root,
            "data.val_root",
            "--json writes what is measured on it; add data.val_root=/path/to/val",
        )
    check(task, _world_size(start))
    return task


def _world_size(start: Start) -> int:
    return this_rank().world_size if launched() else start.nproc


def _say_plan(start: Start, task: Task[Any]) -> int:
    from mae_scale.training.preflight import dry_run

    if this_rank().is_first:
        lines = dry_run(task, _world_size(start), progress=not start.output.quiet)
        typer.echo("\n".join(lines[-1:] if start.output.quiet else lines))
    return EXIT_DONE


def _train_on_local_ranks(start: Start, task: Task[Any]) -> int:
    from mae_scale.training.inputs import PREPARED
    from mae_scale.training.preflight import prepare
    from mae_scale.training.run_lock import hold

    # Here, once and with a progress bar; the ranks then find everything checked, and the folder filled.
    # Rank 0 holds the lock after this.
    with hold(start.out):
        prepare(task, progress=not start.output.quiet)
    return relaunch(start.nproc, **{PREPARED: "1"})


def _train_as_this_rank(start: Start, task: Task[Any]) -> int:
    """Train, and let rank 0 write the figures that --json asks for."""
    from mae_scale.tasks.evaluation import EVALUATION
    from mae_scale.training.run import run

    code = run(task, start.output)
    if start.json is not None and code == EXIT_DONE and this_rank().is_first:
        measured = start.out / EVALUATION
        if not measured.exists():
            raise UsageError(f"--json {start.json}: this start ended before the first evaluation; let it train longer")
        write_figures(start.json, json.loads(measured.read_text(encoding="utf-8")))
    return code
