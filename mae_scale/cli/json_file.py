"""`--json FILE`: the figures of a command, for other programs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.errors import UsageError
from data_pipeline.files import write_json
from mae_scale.cli.options import check_folder_of

Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures to FILE.", show_default=False)
]


def check_json(path: Path | None) -> None:
    """Raise UsageError, before the work is done, when the folder of the file is missing."""
    check_folder_of("--json", path)


def write_figures(path: Path | None, figures: Any) -> None:
    """Write the figures, if a file was asked for. Raises UsageError when it cannot be written."""
    if path is None:
        return
    try:
        write_json(path, figures)
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written: {error.strerror}") from None
