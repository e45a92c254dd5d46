"""The commands on recipes: `mae-scale recipes ...`."""

import shutil

import typer

from mae_scale.cli.options import Overrides, RecipeName

recipes_app = typer.Typer(help="List and show recipes.")


@recipes_app.command("list")
def recipes_list() -> None:
    """List the packaged recipes: name, what each trains, and the expected result.

    Example: `mae-scale recipes list`
    """
    from mae_scale.config.listing import listing

    typer.echo(listing(min(100, shutil.get_terminal_size().columns)))


@recipes_app.command("show")
def recipes_show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Show a recipe with every value and where each comes from; the output is itself a recipe.

    Example: `mae-scale recipes show pretrain/vit_huge_1600ep data.global_batch=2048 > my.yaml`
    """
    from mae_scale.config.listing import annotated

    typer.echo(annotated(recipe, list(overrides or [])))
