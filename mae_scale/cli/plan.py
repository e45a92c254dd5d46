"""`mae-scale plan`."""

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import EXIT_FAILED, UsageError
from mae_scale.cli.json_file import Json, check_json, write_figures
from mae_scale.cli.options import (
    Nproc,
    OptionalRecipeName,
    Overrides,
    Picture,
    can_be_stopped,
    check_folder_of,
    check_picture,
)
from mae_scale.cli.relaunch import relaunch, starts_ranks
from mae_scale.planning.hardware import DEFAULT_LINK

plan_app = typer.Typer()


@plan_app.command()
@can_be_stopped
def plan(
    recipe: OptionalRecipeName = None,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(metavar="N", min=1, help="GPUs per node, a rank each.")] = 8,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="GPU: h100, h200, a100, ...; an unknown one lists all.")
    ] = "h100",
    link: Annotated[
        str, typer.Option(metavar="NAME", help="Link between nodes: infiniband-8x400, ethernet-100, ...")
    ] = DEFAULT_LINK,
    images: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Number of training images; default: those of ImageNet-1K, COCO or ADE20K, by the task.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON of measured rates.", show_default=False)
    ] = None,
    measure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Measure this machine's rates into FILE instead of planning.", show_default=False
        ),
    ] = None,
    nproc: Nproc = 1,
    out: Picture = None,
    json: Json = None,
) -> None:
    """Show what fits on the GPUs, which settings to take, how long the schedule takes, and how it scales.

    Nothing is trained and no GPU is needed. Exit code 1 when no setting fits.

    Example: `mae-scale plan pretrain/vit_huge_1600ep --nodes 8 --gpus-per-node 8 --gpu h100`; `mae-scale plan
    --measure rates.json --nproc 8` also measures the links between ranks, as srun does over nodes
    """
    from mae_scale.config.load import load_recipe
    from mae_scale.tasks.plan import asked_of, make_plan
    from mae_scale.tasks.plan_text import plan_lines

    if measure is not None:
        if recipe is not None:
            raise UsageError(f"--measure plans nothing, and found the recipe {recipe}; give one of them")
        _measure(measure, nproc)
        return
    if recipe is None:
        raise UsageError("no recipe given; expected one such as pretrain/vit_huge_1600ep, or --measure FILE")
    if nproc > 1:
        raise UsageError(f"--nproc {nproc} is for --measure; a plan's GPUs are --nodes and --gpus-per-node")
    check_json(json)
    check_picture(out)
    found = make_plan(
        asked_of(
            recipe,
            load_recipe(recipe, list(overrides or [])),
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            gpu=gpu,
            link=link,
            images=images,
            calibration=calibrate,
        )
    )
    typer.echo("\n".join(plan_lines(found)))
    write_figures(json, found.as_json())
    if out is not None:
        found.draw(out)
        typer.echo(f"{out}")
    if found.best is None:
        raise typer.Exit(EXIT_FAILED)


def _measure(path: Path, nproc: int) -> None:
    """Measure the rates of this rank's GPU in bf16, else of its CPU in float32, and with several ranks their links."""
    check_folder_of("--measure", path)
    if starts_ranks(nproc):
        if code := relaunch(nproc):
            raise typer.Exit(code)
        return
    from mae_scale.distributed.ranks import ranks_from_environment
    from mae_scale.planning.measure import measure_machine

    ranks = ranks_from_environment()
    found = measure_machine(ranks)
    if ranks.is_first:
        write_figures(path, found)
        typer.echo(f"{found['device']}, {found['precision']}, {ranks.world_size} rank(s): {path}")
