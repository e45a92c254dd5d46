"""The command that writes the words of a folder's images once: `mae-scale tokens`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import EXIT_FAILED, UsageError
from mae_scale.cli.options import Nproc, OptionalRecipeName, Overrides, can_be_stopped, read_recipe
from mae_scale.cli.relaunch import relaunch, starts_ranks

tokens_app = typer.Typer()


@tokens_app.command()
@can_be_stopped
def tokens(
    recipe: OptionalRecipeName = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder to write; words found there are kept and completed.", show_default=False
        ),
    ] = None,
    tokeniser: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A file of a tokeniser's weights, or the folder of a run of task dvae; default: tokeniser.weights.",
            show_default=False,
        ),
    ] = None,
    shard_images: Annotated[int, typer.Option(metavar="N", min=1, help="Number of images in each file.")] = 2048,
    verify: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Check the files of a finished folder, and write nothing."),
    ] = None,
    nproc: Nproc = 1,
) -> None:
    """Write the words of data.root's images, as the recipe's task would find them with data.augmentation=none.

    The same command goes on where one was stopped, and writes damaged files again.

    Example: `mae-scale tokens pretrain/beit_vit_base_800ep --tokeniser encoder.pkl --out words --nproc 8
    data.root=/data/imagenet/train`
    """
    if verify is not None:
        if recipe is not None or out is not None:
            raise UsageError("--verify only checks a folder; drop the recipe and --out")
        _verify(verify)
        return
    if recipe is None or out is None:
        raise UsageError("give a recipe and --out DIR to write words, or --verify DIR to check them")
    loaded = read_recipe(recipe, overrides)
    from mae_scale.tasks import tokenise

    path = tokenise.check(loaded, tokeniser, out)
    if starts_ranks(nproc):
        if code := relaunch(nproc):
            raise typer.Exit(code)
        return
    heading = tokenise.write_tokens(loaded, path, out, shard_images)
    if heading is not None:
        typer.echo(
            f"{out}: {heading.images:,} images x {heading.grid**2} of {heading.words:,} words, "
            f"{_files(len(heading.shards))}"
        )


def _files(count: int) -> str:
    return f"{count:,} file{'s' if count != 1 else ''}"


def _verify(folder: Path) -> None:
    """Print the damage of each file; exit code 1 when there is any."""
    from mae_scale.tasks.tokens import verify_tokens

    heading, damaged = verify_tokens(folder)
    for name, reason in damaged:
        typer.echo(f"{name}: {reason}")
    if damaged:
        typer.echo(f"{_files(len(damaged))} damaged; the same `mae-scale tokens` that wrote the words mends them")
        raise typer.Exit(EXIT_FAILED)
    typer.echo(f"{heading.images:,} images x {heading.grid**2} words, every file has its digest")
