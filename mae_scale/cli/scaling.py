"""The commands on scaling curves: `mae-scale scaling fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import UsageError
from mae_scale.cli.json_file import Json, check_json, write_figures

if TYPE_CHECKING:
    pass

scaling_app = typer.Typer(help="Fit scaling curves.")


@scaling_app.callback()
def scaling() -> None:
    """Fit scaling curves."""


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
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="PNG to write.", show_default=False)] = None,
    json: Json = None,
) -> None:
    """Fit L = E + A x^-alpha to one value per run, the last of its schedule, and predict the largest from the others.

    Example: `mae-scale scaling fit runs/sizes --x compute --y val/loss --out fit.png`
    """
    from mae_scale.tasks.scaling_fit import draw, fit_points
    from mae_scale.tasks.scaling_points import read_points

    check_json(json)
    if out is not None and out.suffix != ".png":
        raise UsageError(f"--out {out}: expected a name that ends in .png")
    found = fit_points(read_points(sweep, x, y), x=x, y=y, shifted=shift)
    typer.echo("\n".join(found.lines()))
    write_figures(json, found.as_json())
    if out is not None:
        draw(found, out)
        typer.echo(f"{out}")
