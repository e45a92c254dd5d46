"""`mae-scale demo`: the whole story on a laptop."""

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import UsageError
from mae_scale.cli.json_file import Json, check_json, write_figures
from mae_scale.cli.options import can_be_stopped

demo_app = typer.Typer()


@demo_app.command()
@can_be_stopped
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for data, run and figures.")] = Path("demo"),
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the run.")] = 0,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Run the paper's transfer comparison in small instead, with three seeds.")
    ] = False,
    dense: Annotated[
        bool,
        typer.Option("--dense", help="Run detection and segmentation in small instead, with three seeds."),
    ] = False,
    json: Json = None,
) -> None:
    """Run everything once on a laptop: data, pre-training on two ranks, probe, figures, MLflow.

    Example: `mae-scale demo --out demo`, then `mae-scale demo --out demo --transfer --json transfer.json`
    """
    if transfer and dense:
        raise UsageError("--transfer and --dense are two comparisons; run one after the other")
    if transfer or dense:
        if seed:
            raise UsageError("--seed is for the plain demo; --transfer and --dense run the seeds 0, 1 and 2")
        from mae_scale.reproduce.digits_transfer import run_transfer
        from mae_scale.reproduce.scenes import run_dense

        check_json(json)
        write_figures(json, run_dense(out) if dense else run_transfer(out))
        return
    if json is not None:
        raise UsageError("--json is for `demo --transfer` and `demo --dense`; the plain demo prints its two figures")
    from mae_scale.reproduce.digits import run_demo

    run_demo(out, seed)
