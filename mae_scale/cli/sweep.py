"""The command for many runs: `mae-scale sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mae_scale.cli.completion import complete_override, complete_recipe
from mae_scale.cli.options import Nproc, RecipeName, SweepName, can_be_stopped
from mae_scale.cli.slurm import Account, CpusPerTask, GpusPerNode, Nodes, NtasksPerNode, Partition, Time

sweep_app = typer.Typer()

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="section.key=v1,v2",
        help="The grid: several values of a key, or of keys that change together (k:l=v1:w1,v2:w2); one value is for "
        "all runs; then.KEY=V is for the transfer.",
        show_default=False,
        autocompletion=complete_override,
    ),
]


@sweep_app.command()
@can_be_stopped
def sweep(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the runs' folders; those that are done stay.")],
    grid: Words = None,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Seeds per point, counted from the recipe's.")] = 1,
    then: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Recipe of a transfer after each run, from its weights.",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ] = None,
    name: SweepName = None,
    nproc: Nproc = 1,
    slurm: Annotated[bool, typer.Option("--slurm", help="Send each run as a job, of --nodes and so on.")] = False,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    ntasks_per_node: NtasksPerNode = None,
    cpus_per_task: CpusPerTask = None,
    partition: Partition = None,
    account: Account = None,
    time: Time = None,
) -> None:
    """Train a grid of runs, one after the other or as Slurm jobs, and show their results beside each other.

    The same command goes on where it was cut off; more values or seeds add runs. Each is an ordinary run, a child of
    one parent run in MLflow.

    Example: `mae-scale sweep demo model.mask_ratio=0.4,0.6,0.75,0.9 --seeds 3 --then probe/demo --out sweeps/mask_ratio
    data.root=digits/train data.val_root=digits/val`
    """
    from mae_scale.launch.grid import read_grid
    from mae_scale.launch.slurm import Shape
    from mae_scale.launch.sweep import Sweep, run_sweep
    from mae_scale.launch.sweep_slurm import submit_sweep

    found = read_grid(recipe, list(grid or []), seeds)
    asked = Sweep(recipe, found, then, out, name or out.absolute().name)
    if not slurm:
        raise typer.Exit(run_sweep(asked, nproc))
    shape = Shape(nodes, gpus_per_node, ntasks_per_node, cpus_per_task, partition=partition, account=account, time=time)
    raise typer.Exit(submit_sweep(asked, shape))
