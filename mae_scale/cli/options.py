"""What the commands have in common: options by name, and how a JSON file is written."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer

from data_pipeline.errors import UsageError
from mae_scale.cli.completion import complete_override, complete_recipe
from mae_scale.distributed import stop_requests

Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads it at run time)
    typer.Argument(
        metavar="section.key=value",
        help="Changes to the recipe.",
        show_default=False,
        autocompletion=complete_override,
    ),
]
RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A packaged name, or a path.", show_default=False, autocompletion=complete_recipe
    ),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Output folder; a run found there goes on.", show_default=False)]
Nproc = Annotated[int, typer.Option(metavar="N", min=1, help="Local ranks to start when no launcher has.")]
TrackingUri = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="URI", help="MLflow tracking URI; off: none.", show_default=False),
]
Weights = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        metavar="PATH",
        help="A run's folder, a checkpoint, or a file of weights (ours, the authors', timm's, Hugging Face's).",
    ),
]
Json = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--json", metavar="FILE", help="Write the figures there, too.", show_default=False),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything and say what the start would do; write nothing, train nothing."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show errors and the last line only.")]
LogFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        metavar="FILE", help="Append there all that is said, also under --quiet; without the bar.", show_default=False
    ),
]


def can_be_stopped(command: Callable) -> Callable:
    """Return the command as one that listens to SIGTERM, SIGUSR1 and Ctrl-C, from before its heavy imports on."""

    @functools.wraps(command)
    def listening(*arguments, **options):
        stop_requests.listen()
        return command(*arguments, **options)

    return listening


def read_recipe(recipe: str, overrides: list[str] | None):
    """Return the recipe with the overrides; what is wrong with them is so on every rank."""
    from mae_scale.config.load import load_recipe

    try:
        return load_recipe(recipe, list(overrides or []))
    except UsageError as error:
        error.on_all_ranks = True
        raise


def with_weights(overrides: list[str] | None, weights: Path | None) -> list[str]:
    return [*(overrides or []), *([f"classifier.weights={weights}"] if weights else [])]


def check_file(option: str, path: Path | None) -> None:
    """UsageError, before the work is done, when there is no folder for the file that an option asks for."""
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(
            f"{option} {path}: there is no folder {path.absolute().parent}; make it, or choose another place"
        )


def write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written: {error.strerror}") from None
