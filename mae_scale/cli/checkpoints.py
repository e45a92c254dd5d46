"""The commands on checkpoints."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from data_pipeline.errors import EXIT_FAILED

checkpoints_app = typer.Typer(help="The checkpoints of a run: which there are, and whether they are whole.")
Run = Annotated[Path, typer.Argument(metavar="DIR", help="The --out of a run, or its folder checkpoints.")]


@checkpoints_app.command("list")
def checkpoints_list(run: Run) -> None:
    """A table: step, age, size, whole or not (by the files' sizes).

    Example: `mae-scale checkpoints list runs/vit_huge`
    """
    from mae_scale.checkpoints.maintenance import checkpoints_of, print_table, verify_sizes

    print_table(checkpoints_of(run), verify_sizes)


@checkpoints_app.command("verify")
def checkpoints_verify(run: Run) -> None:
    """Read every byte and compare it to its digest; exit code 1 when a checkpoint is not whole.

    Example: `mae-scale checkpoints verify runs/vit_huge`
    """
    from mae_scale.checkpoints.maintenance import checkpoints_of, print_table
    from mae_scale.checkpoints.store import verify

    if not print_table(checkpoints_of(run), verify):
        raise typer.Exit(EXIT_FAILED)


@checkpoints_app.command("prune")
def checkpoints_prune(
    run: Run,
    keep: Annotated[int, typer.Option(metavar="N", min=1, help="The newest so many stay.")] = 1,
    keep_every_epochs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", min=1, help="Those of every n-th epoch stay too.", show_default=False),
    ] = None,
    keep_best: Annotated[bool, typer.Option("--keep-best", help="The one with the lowest loss stays too.")] = False,
) -> None:
    """Remove whole checkpoints that are no longer needed, and what interrupted saves left; not while the run goes on.

    Example: `mae-scale checkpoints prune runs/vit_huge --keep 1 --keep-every-epochs 100`
    """
    from mae_scale.checkpoints.maintenance import checkpoints_of, prune
    from mae_scale.checkpoints.store import Retention
    from mae_scale.training.run_lock import refuse_held

    checkpoints = checkpoints_of(run)
    refuse_held(checkpoints.parent)
    gone = prune(checkpoints, Retention(keep, keep_every_epochs, keep_best))
    for folder in gone:
        typer.echo(f"removed {folder.name}")
    typer.echo(f"{len(gone)} removed")
