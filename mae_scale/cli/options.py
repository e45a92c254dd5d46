"""Options and arguments that several commands have, and what they do with them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer

from data_pipeline.errors import UsageError
from mae_scale.cli.completion import complete_override, complete_recipe
from mae_scale.distributed import stop_requests

if TYPE_CHECKING:
    from mae_scale.config.schema import Recipe

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="section.key=value",
        help="Changes to the recipe.",
        show_default=False,
        autocompletion=complete_override,
    ),
]
_RECIPE = typer.Argument(
    metavar="RECIPE",
    help="A packaged recipe's name, or the path of a YAML file.",
    show_default=False,
    autocompletion=complete_recipe,
)
RecipeName = Annotated[str, _RECIPE]
OptionalRecipeName = Annotated[str | None, _RECIPE]
Out = Annotated[
    Path, typer.Option(metavar="DIR", help="Output folder; a run found there is resumed.", show_default=False)
]
Nproc = Annotated[
    int,
    typer.Option(
        metavar="N", min=1, help="Number of local ranks to start; ignored under torchrun, deepspeed and srun."
    ),
]
TrackingUri = Annotated[
    str | None,
    typer.Option(metavar="URI", help="MLflow tracking URI; off: no tracking.", show_default=False),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="A run's folder, a checkpoint, or a file of weights (ours, the authors', timm's, Hugging Face's).",
    ),
]
SweepName = Annotated[
    str | None,
    typer.Option(
        "--name", metavar="NAME", help="Name of the sweep in MLflow; default: the folder's.", show_default=False
    ),
]
Picture = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="PNG to write.", show_default=False)]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything and print what the start would do; write nothing, train nothing."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show errors and the last line only.")]
LogFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Append all output to FILE, also under --quiet, without the progress bar.",
        show_default=False,
    ),
]


def can_be_stopped(command: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return the command as one that listens to SIGTERM, SIGUSR1 and Ctrl-C, from before its heavy imports on."""

    @functools.wraps(command)
    def listening(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        stop_requests.listen()
        return command(*arguments, **options)

    return listening


def read_recipe(recipe: str, overrides: list[str] | None) -> "Recipe":
    """Return the recipe with the overrides. Raises UsageError, the same on every rank."""
    from mae_scale.config.load import load_recipe

    try:
        return load_recipe(recipe, list(overrides or []))
    except UsageError as error:
        error.on_all_ranks = True
        raise


def with_weights(recipe: str, overrides: list[str] | None, weights: Path | None, *, trained: bool = False) -> list[str]:
    """Return the overrides with that of --weights, for the section of the recipe's task that takes it.

    trained: the weights are to be measured, also those of a run that was begun from scratch by the same recipe.
    Raises UsageError when the task starts from no weights.
    """
    overrides = list(overrides or [])
    if weights is None:
        return overrides
    from mae_scale.config.schema import STARTING

    task = read_recipe(recipe, overrides).task
    if task not in STARTING:
        raise UsageError(
            f"--weights {weights}: the recipe's task is {task}, which starts from none; drop it", on_all_ranks=True
        )
    section = STARTING[task]
    return [*overrides, f"{section}.weights={weights}", *([f"{section}.from_scratch=false"] if trained else [])]


def check_folder_of(option: str, path: Path | None) -> None:
    """Raise UsageError, before the work is done, when there is no folder for the file that an option asks for."""
    if path is not None and not path.absolute().parent.is_dir():
        raise UsageError(
            f"{option} {path}: there is no folder {path.absolute().parent}; make it, or choose another place"
        )


def check_picture(out: Path | None) -> None:
    """Raise UsageError, before the work is done, for a name that is not a PNG's."""
    if out is not None and out.suffix != ".png":
        raise UsageError(f"--out {out}: expected a name that ends in .png")
