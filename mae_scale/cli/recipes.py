"""The commands on recipes, `mae-scale recipes ...`, and what a shell completes: their names, and keys of overrides."""

import shutil

import typer

from mae_scale.cli.options import Overrides, RecipeName

recipes_app = typer.Typer(help="The recipes that come with mae-scale, and what they say.")


@recipes_app.command("list")
def recipes_list() -> None:
    """The packaged recipes: name, what each trains, and what it should reach.

    Example: `mae-scale recipes list`
    """
    from mae_scale.config.listing import listing

    typer.echo(listing(min(100, shutil.get_terminal_size().columns)))


@recipes_app.command("show")
def recipes_show(recipe: RecipeName, overrides: Overrides = None) -> None:
    """A recipe with every value, and where each comes from; what is printed is a recipe, too.

    Example: `mae-scale recipes show pretrain/vit_huge_1600ep data.global_batch=2048 > my.yaml`
    """
    from mae_scale.config.listing import annotated

    typer.echo(annotated(recipe, list(overrides or [])))
