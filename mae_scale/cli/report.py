"""`mae-scale report`: one HTML page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import UsageError

report_app = typer.Typer()


@report_app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="DIR", help="Folders of runs, finished or not, or folders of such folders.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="HTML page to write.")] = Path("report.html"),
) -> None:
    """Write one page about runs that opens without a network: curves, reconstructions, events, recipes, environment.

    Example: `mae-scale report sweeps/mask_ratio --out mask_ratio.html`
    """
    from data_pipeline.files import write_atomically
    from mae_scale.reports.page import render
    from mae_scale.tasks.run_report import page_of_folders

    if out.suffix != ".html":
        raise UsageError(f"--out {out}: expected a name that ends in .html")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the name of a file in it, such as {out / 'report.html'}")
    page = page_of_folders(runs)
    content = render(page)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, content)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from None
    for note in [*page.notes, *(f"{run.name}: {note}" for run in page.runs for note in run.notes)][:20]:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{out}: {len(page.runs):,} runs, {len(content) / 2**20:.1f} MiB")
