"""`mae-scale compare`: runs beside each other, over the curve of the packaged recipe that is nearest to them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import UsageError

if TYPE_CHECKING:
    from mae_scale.training.reference_curves import ComparedRun

compare_app = typer.Typer()


@compare_app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR", help="Folders of runs, finished or not.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="PNG to write.")] = Path("compare.png"),
) -> None:
    """Draw the losses of runs by epoch over those of the packaged recipe that is nearest: is my loss normal?

    Example: `mae-scale compare runs/vit_large runs/vit_large_lr2 --out compare.png`
    """
    from mae_scale.reports.comparison import comparison_figure
    from mae_scale.training.reference_curves import compared_run

    if out.suffix != ".png":
        raise UsageError(f"--out {out}: expected a name that ends in .png")
    found = [compared_run(run) for run in runs]
    references = {run.reference.name: run.reference.curve for run in found if run.reference is not None}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        comparison_figure({_name(path): run.curve for path, run in zip(runs, found, strict=True)}, references, out)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror}") from None
    for path, run in zip(runs, found, strict=True):
        typer.echo(f"{path}:")
        for line in _said(run):
            typer.echo(f"  {line}")
    typer.echo(f"{out}")


def _name(path: Path) -> str:
    return "/".join(path.parts[-2:])


def _said(run: ComparedRun) -> list[str]:
    """Return lines on a run: its newest values, and the reference's at the same epoch."""
    reference = run.reference
    lines = []
    for metric, values in run.curve.items():
        epoch, value = [(k, value) for k, value in enumerate(values, start=1) if value is not None][-1]
        line = f"{metric:16} {value:10.4f}  epoch {epoch} of {run.epochs}"
        usual = reference.curve.get(metric, []) if reference else []
        if epoch <= len(usual) and (there := usual[epoch - 1]) is not None:
            line += f"  reference {there:10.4f} ({round(value / there - 1, 3) + 0:+.1%})"
        lines.append(line)
    if reference is None:
        return [*lines, "no packaged recipe that was run is like this one: no reference"]
    differs = f", which has other values: {'; '.join(reference.differs)}" if reference.differs else ""
    return [*lines, f"reference: {reference.name}, {reference.ran_on}{differs}"]
