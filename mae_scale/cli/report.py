"""`mae-scale report`: one HTML page about runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import UsageError
from mae_scale.cli.options import TrackingUri
from mae_scale.tracking.mlflow_uri import VARIABLE

if TYPE_CHECKING:
    from mae_scale.reports.page_content import Page

report_app = typer.Typer()


@report_app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR",
            help="Folders of runs, finished or not, or folders of such folders; else the name of an MLflow experiment.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="HTML page to write.")] = Path("report.html"),
    tracking_uri: TrackingUri = None,
) -> None:
    """Write one page about runs that opens without a network: curves, reconstructions, events, recipes, environment.

    Example: `mae-scale report sweeps/mask_ratio --out mask_ratio.html`
    """
    from data_pipeline.files import write_atomically
    from mae_scale.reports.page import render

    if out.suffix != ".html":
        raise UsageError(f"--out {out}: expected a name that ends in .html")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the name of a file in it, such as {out / 'report.html'}")
    page = _page(runs, tracking_uri)
    content = render(page)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, content)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from None
    for note in [*page.notes, *(f"{run.name}: {note}" for run in page.runs for note in run.notes)][:20]:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{out}: {len(page.runs):,} runs, {len(content) / 2**20:.1f} MiB")


def _page(runs: list[Path], given: str | None) -> Page:
    """Return the page of folders; of an experiment with --tracking-uri, or where the one name is no folder."""
    from mae_scale.tasks.run_report import page_of_experiment, page_of_folders
    from mae_scale.tracking.mlflow_uri import tracking_uri

    is_name = len(runs) == 1 and not runs[0].exists()
    known = bool(os.environ.get(VARIABLE, "").strip())
    if given is None and not (is_name and known):
        if is_name:
            raise UsageError(
                f"{runs[0]} does not exist; expected a run's folder or a folder of runs; for an experiment of MLflow "
                f"add --tracking-uri, or set {VARIABLE}"
            )
        return page_of_folders(runs)
    if len(runs) > 1:
        raise UsageError(f"--tracking-uri takes the name of one experiment, and found {len(runs)} names")
    uri = tracking_uri(given, Path())
    if uri is None:
        raise UsageError(f"tracking is off, so there is no experiment {runs[0]}; give --tracking-uri of MLflow")
    return page_of_experiment(str(runs[0]), uri)
