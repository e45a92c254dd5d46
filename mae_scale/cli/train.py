"""The commands that train: `mae-scale pretrain`, `finetune`, `probe`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from data_pipeline.errors import EXIT_DONE, UsageError
from mae_scale.cli.options import (
    DryRun,
    Json,
    LogFile,
    Nproc,
    Out,
    Overrides,
    Quiet,
    RecipeName,
    TrackingUri,
    Weights,
    can_be_stopped,
    check_file,
    read_recipe,
    with_weights,
    write_text,
)
from mae_scale.distributed.ranks import launched, this_rank
from mae_scale.tracking.output import Output

if TYPE_CHECKING:
    from mae_scale.training.task import Task

train_app = typer.Typer()


@dataclass(frozen=True)
class Start:
    """What a command that trains was given."""

    command: str
    recipe: str
    overrides: list[str]
    out: Path
    nproc: int
    dry_run: bool
    output: Output


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
    """Pre-train a masked autoencoder.

    Example: `mae-scale pretrain demo --nproc 2 --out runs/demo data.root=digits/train`
    """
    overrides = _with_uri(overrides, tracking_uri)
    raise typer.Exit(
        _train(Start("pretrain", recipe, overrides, out, nproc=nproc, dry_run=dry_run, output=Output(quiet, log_file)))
    )


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
    """Train a classifier: end to end, its last blocks, its head alone, or everything from scratch, as the recipe says.

    Example: `mae-scale finetune finetune/vit_huge_224 --weights runs/vit_huge --out runs/vit_huge_224
    data.root=/data/imagenet/train data.val_root=/data/imagenet/val`
    """
    overrides = _with_uri(with_weights(overrides, weights), tracking_uri)
    start = Start("finetune", recipe, overrides, out, nproc=nproc, dry_run=dry_run, output=Output(quiet, log_file))
    raise typer.Exit(_classify(start, json))


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
    """Linear probing: the head alone is trained on a frozen encoder; `finetune` with a recipe of that kind.

    Example: `mae-scale probe probe/vit_large --weights runs/vit_large --out runs/vit_large_probe
    data.root=/data/imagenet/train data.val_root=/data/imagenet/val`
    """
    overrides = _with_uri(with_weights(overrides, weights), tracking_uri)
    start = Start("probe", recipe, overrides, out, nproc=nproc, dry_run=dry_run, output=Output(quiet, log_file))
    raise typer.Exit(_classify(start, json))


def _with_uri(overrides: list[str] | None, tracking_uri: str | None) -> list[str]:
    return [*(overrides or []), *([] if tracking_uri is None else [f"tracking.uri={tracking_uri}"])]


def _classify(start: Start, json: Path | None) -> int:
    """Train a classifier; return the exit code. What was measured is written to `json` by rank 0."""
    check_file("--json", json)
    code = _train(start)
    if json is not None and not start.dry_run and code == EXIT_DONE and this_rank().is_first:
        from mae_scale.tasks.classification.validation import EVALUATION

        measured = start.out / EVALUATION
        if not measured.exists():
            raise UsageError(f"--json {json}: nothing was measured; add data.val_root=/path/to/validation images")
        write_text(json, measured.read_text(encoding="utf-8"))
    return code


def _train(start: Start) -> int:
    """Train as this rank, or on local ranks started here; return the exit code."""
    from mae_scale.training.preflight import check, dry_run
    from mae_scale.training.run import run

    output = start.output
    check_file("--log-file", output.log_file)
    with Output(output.quiet) if start.dry_run else output:
        task = _task(start)
        ranks = this_rank().world_size if launched() else start.nproc
        check(task, ranks)
        if start.dry_run:
            if this_rank().is_first:
                lines = dry_run(task, ranks, progress=not output.quiet)
                typer.echo("\n".join(lines[-1:] if output.quiet else lines))
            return EXIT_DONE
        if launched() or start.nproc == 1:
            return run(task, output)
        return _train_on_local_ranks(start, task)


def _task(start: Start) -> Task[Any]:
    """Return the task of the recipe. Raises UsageError when it is not one of the command's."""
    from mae_scale.tasks.classification.task import refuse_more_than_head
    from mae_scale.tasks.registry import task_for

    recipe = read_recipe(start.recipe, start.overrides)
    task = task_for("finetune" if start.command == "probe" else start.command, recipe, start.out)
    if start.command == "probe":
        refuse_more_than_head(recipe)
    return task


def _train_on_local_ranks(start: Start, task: Task[Any]) -> int:
    from mae_scale.launch.local import launch_local_ranks
    from mae_scale.training.inputs import PREPARED
    from mae_scale.training.preflight import prepare
    from mae_scale.training.run_lock import hold

    # Here, once and with a progress bar; the ranks then find everything checked, and the folder filled.
    # Rank 0 holds the lock after this.
    with hold(start.out):
        prepare(task, progress=not start.output.quiet)
    words = [start.command, start.recipe, *start.overrides, "--out", str(start.out), *start.output.arguments()]
    return launch_local_ranks(start.nproc, words, environment={PREPARED: "1"})
