"""The commands on scaling: `mae-scale scaling run`, `report`, `fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import UsageError
from mae_scale.cli.json_file import Json, check_json, write_figures
from mae_scale.cli.options import Overrides, Picture, RecipeName, SweepName, can_be_stopped, check_picture

scaling_app = typer.Typer(help="Measure throughput on several numbers of ranks; fit scaling curves.")

KINDS = ("strong", "weak")


@scaling_app.command("run")
@can_be_stopped
def scaling_run(
    recipe: RecipeName,
    ranks: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of local ranks, such as 1,2,4.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the points; those that are done stay.")],
    overrides: Overrides = None,
    kind: Annotated[
        str,
        typer.Option(metavar="KIND", help="strong: one global batch; weak: the recipe's is that of the fewest ranks."),
    ] = "strong",
    steps: Annotated[int, typer.Option(metavar="N", min=5, help="Steps per point; a fifth of them warms up.")] = 100,
    name: SweepName = None,
) -> None:
    """Train the first steps of a recipe on several numbers of ranks of this machine, one after the other.

    Example: `mae-scale scaling run pretrain/vit_base_800ep --ranks 1,2,4,8 --kind weak --out scaling/vit_base
    data.root=/data/imagenet/train`
    """
    from mae_scale.launch.scaling_run import ThroughputSweep, ranks_of, run_sweep

    if kind not in KINDS:
        raise UsageError(f"--kind {kind} is not known; expected strong or weak")
    sweep = ThroughputSweep(
        recipe,
        list(overrides or []),
        ranks_of(ranks),
        weak=kind == "weak",
        steps=steps,
        out=out,
        name=name or out.absolute().name,
    )
    raise typer.Exit(run_sweep(sweep))


@scaling_app.command("report")
def scaling_report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of `scaling run` or slurm/scaling.sbatch.")],
    out: Picture = None,
    json: Json = None,
) -> None:
    """Show images per second, efficiency and the parts of a step's time against the number of ranks.

    Points that are queued, running, cancelled or failed are listed as such.

    Example: `mae-scale scaling report scaling/vit_base --out scaling.png`
    """
    from mae_scale.launch.scaling_run import planned
    from mae_scale.launch.slurm_queue import submitted
    from mae_scale.tasks.sweep_of_runs import sweep_of_runs
    from mae_scale.tasks.throughput import as_json, draw, lines
    from mae_scale.tasks.throughput_page import publish
    from mae_scale.tasks.throughput_points import read_points

    check_json(json)
    check_picture(out)
    points = read_points(folder, planned(folder) | submitted(folder))
    typer.echo("\n".join(lines(points)))
    write_figures(json, as_json(points))
    if out is not None:
        draw(points, out, title=str(folder))
        typer.echo(f"{out}")
    sweep = sweep_of_runs(folder)
    if sweep is not None:
        publish(points, folder, sweep)


@scaling_app.command("fit")
def scaling_fit(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="Folder of the folders of finished runs.")],
    x: Annotated[str, typer.Option("--x", metavar="AXIS", help="compute, epochs, images or parameters.")] = "compute",
    y: Annotated[
        str, typer.Option("--y", metavar="METRIC", help="val/loss, train/loss, or error by top1 or knn_top1.")
    ] = "val/loss",
    shift: Annotated[
        bool, typer.Option("--shift", help="Fit (x + c) in place of x, as Zhai et al. (2021) do; takes ten points.")
    ] = False,
    out: Picture = None,
    json: Json = None,
) -> None:
    """Fit L = E + A x^-alpha to one value per run, the last of its schedule, and predict the largest from the others.

    Example: `mae-scale scaling fit runs/sizes --x compute --y val/loss --out fit.png`
    """
    from mae_scale.tasks.scaling_fit import draw, fit_points, publish
    from mae_scale.tasks.scaling_points import read_points
    from mae_scale.tasks.sweep_of_runs import sweep_of_runs

    check_json(json)
    check_picture(out)
    found = fit_points(read_points(sweep, x, y), x=x, y=y, shifted=shift)
    typer.echo("\n".join(found.lines()))
    write_figures(json, found.as_json())
    if out is not None:
        draw(found, out)
        typer.echo(f"{out}")
    parent = sweep_of_runs(sweep)
    if parent is not None:
        publish(found, sweep, parent)
