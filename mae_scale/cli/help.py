"""The command line itself: calling it, `mae-scale --version`, and help without Python's types."""

from typing import Annotated, Any

import typer

from mae_scale import __version__


def run(app: typer.Typer, *, speaks: bool) -> int | None:
    """Run the command line; return the exit code.

    With `speaks` wrong arguments are explained on stderr and SystemExit is raised; else click's own errors are raised.
    """
    command = typer.main.get_command(app)
    _hide_types(command)
    return command(prog_name="mae-scale", standalone_mode=speaks)


def _hide_types(command: Any) -> None:
    """Hide Python's types behind flags and arguments, such as <bool> or <list[str]>; an option's metavar stays."""
    for parameter in command.get_params(typer.Context(command)):
        if parameter.param_type_name == "argument" or parameter.is_flag:
            parameter.display_type_rich = lambda ctx: None
    for below in getattr(command, "commands", {}).values():
        _hide_types(below)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mae-scale {__version__}")
        raise typer.Exit


def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options of `mae-scale` itself."""
