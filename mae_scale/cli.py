"""The commands: parse, call, print. Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 75 stopped on request."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Optional

import typer

from mae_scale.cli_files import checkpoints_app, data_app
from mae_scale.cli_help import common, run
from mae_scale.cli_measure import measure_app
from mae_scale.cli_options import (
    DryRun,
    Json,
    LogFile,
    Nproc,
    Out,
    Overrides,
    Quiet,
    RecipeName,
    TrackingUri,
    Weights,
    check_file,
    with_weights,
    write_text,
)
from mae_scale.cli_recipes import recipes_app
from mae_scale.completion import complete_chain
from mae_scale.errors import EXIT_DONE, EXIT_FAILED, RunError, UsageError
from mae_scale.tracking.output import Output, is_first_rank
from mae_scale.training import preemption

app = typer.Typer(
    name="mae-scale",
    callback=common,
    help="Masked-autoencoder pre-training of Vision Transformers, from one laptop to a Slurm cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(measure_app)
app.add_typer(data_app, name="data", no_args_is_help=True)
app.add_typer(checkpoints_app, name="checkpoints", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes", no_args_is_help=True)


@app.command()
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Out = ...,
    nproc: Nproc = 1,
    tracking_uri: TrackingUri = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
) -> None:
    """Pre-train a masked autoencoder.

    Example: `mae-scale pretrain demo --nproc 2 --out runs/demo data.root=digits/train`
    """
    # Before the heavy imports: a request to stop that comes during them is kept.
    preemption.listen()
    from mae_scale.training.pretrain import Pretraining

    output = Output(quiet, log_file)
    raise typer.Exit(_train("pretrain", Pretraining, recipe, overrides, out, nproc, tracking_uri, dry_run, output))


@app.command()
def finetune(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Out = ...,
    weights: Weights = None,
    nproc: Nproc = 1,
    tracking_uri: TrackingUri = None,
    json: Json = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
) -> None:
    """Train a classifier: end to end, its last blocks, its head alone, or everything from scratch, as the recipe says.

    Example: `mae-scale finetune finetune/vit_huge_224 --weights runs/vit_huge --out runs/vit_huge_224
    data.root=/data/imagenet/train data.val_root=/data/imagenet/val`
    """
    preemption.listen()
    from mae_scale.training.finetune import Finetuning

    overrides, output = with_weights(overrides, weights), Output(quiet, log_file)
    job = ("finetune", Finetuning, recipe, overrides, out, nproc, tracking_uri)
    raise typer.Exit(_classify(*job, json, dry_run, output))


@app.command()
def probe(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Out = ...,
    weights: Weights = None,
    nproc: Nproc = 1,
    tracking_uri: TrackingUri = None,
    json: Json = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
) -> None:
    """Linear probing: the head alone is trained on a frozen encoder; `finetune` with a recipe of that kind.

    Example: `mae-scale probe probe/vit_large --weights runs/vit_large --out runs/vit_large_probe
    data.root=/data/imagenet/train data.val_root=/data/imagenet/val`
    """
    preemption.listen()
    from mae_scale.training.finetune import Probing

    overrides, output = with_weights(overrides, weights), Output(quiet, log_file)
    job = ("probe", Probing, recipe, overrides, out, nproc, tracking_uri)
    raise typer.Exit(_classify(*job, json, dry_run, output))


def _classify(command, job_class, recipe, overrides, out, nproc, tracking_uri, json, dry_run, output) -> int:
    """A classifier's training; the exit code. What was measured is written to `json` by rank 0."""
    check_file("--json", json)
    code = _train(command, job_class, recipe, overrides, out, nproc, tracking_uri, dry_run, output)
    if json is not None and not dry_run and code == EXIT_DONE and os.environ.get("RANK", "0") == "0":
        from mae_scale.training.finetune import EVALUATION

        if not (out / EVALUATION).exists():
            raise UsageError(f"--json {json}: nothing was measured; add data.val_root=/path/to/validation images")
        write_text(json, (out / EVALUATION).read_text(encoding="utf-8"))
    return code


def _train(command, job_class, recipe, overrides, out, nproc, tracking_uri, dry_run, output) -> int:
    """A training job as this rank, or with local ranks started here; the exit code."""
    from mae_scale.recipe import load_recipe
    from mae_scale.training.distributed import launched
    from mae_scale.training.inputs import PREPARED
    from mae_scale.training.launcher import launch_local_ranks
    from mae_scale.training.run_lock import hold

    check_file("--log-file", output.log_file)
    overrides = list(overrides or [])
    if tracking_uri is not None:
        overrides.append(f"tracking.uri={tracking_uri}")
    with Output(output.quiet) if dry_run else output:
        job = job_class(load_recipe(recipe, overrides), out, output)
        ranks = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) if launched() else nproc
        job.check(ranks)
        if dry_run:
            if is_first_rank():
                lines = job.plan(ranks)
                typer.echo("\n".join(lines[-1:] if output.quiet else lines))
            return EXIT_DONE
        if launched() or nproc == 1:
            return job.run()
        # Here, once and with a progress bar; the ranks then find everything checked, and the folder filled.
        # Rank 0 holds the lock after this.
        with hold(out):
            job.prepare()
        words = [command, recipe, *overrides, "--out", str(out), *output.arguments()]
        return launch_local_ranks(nproc, words, environment={PREPARED: "1"})


@app.command()
def doctor(
    build: Annotated[bool, typer.Option("--build", help="Build DeepSpeed's helpers now, once.")] = False,
) -> None:
    """Show what is installed, which devices there are and what will be used.

    Example: `mae-scale doctor`
    """
    from mae_scale import doctor as checks

    if build:
        checks.build()
    else:
        checks.report()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for data, run and pictures.")] = Path("demo"),
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the run.")] = 0,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="The paper's comparison in small: every way of transfer, three seeds.")
    ] = False,
    json: Json = None,
) -> None:
    """The whole story on a laptop: data, pre-training with two ranks, probe, pictures, MLflow.

    Example: `mae-scale demo --out demo`, then `mae-scale demo --out demo --transfer --json transfer.json`
    """
    if transfer:
        if seed:
            raise UsageError("--seed is for the plain demo; --transfer runs the seeds 0, 1 and 2")
        from mae_scale.transfer_demo import run_transfer

        run_transfer(out, json)
        return
    if json is not None:
        raise UsageError("--json is for `demo --transfer`; the plain demo prints its two figures")
    from mae_scale.demo import run_demo

    run_demo(out, seed)


@app.command()
def submit(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|section.key=value",
            autocompletion=complete_chain,
            help="A chain; overrides are for every recipe, those of the section classifier for classifiers.",
        ),
    ],
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Nodes of each job.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Parent folder: DIR/slurm, and a folder for each recipe.")],
    gpus_per_node: Annotated[int, typer.Option(metavar="N", min=0, help="0: nodes without GPUs.")] = 8,
    ntasks_per_node: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", min=1, help="Ranks a node; by default one a GPU.", show_default=False),
    ] = None,
    cpus_per_task: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", min=1, help="Cores a rank; by default the template's.", show_default=False),
    ] = None,
    partition: Annotated[Optional[str], typer.Option(metavar="NAME", help="By default the site's.")] = None,  # noqa: UP045
    account: Annotated[Optional[str], typer.Option(metavar="NAME", help="By default the site's.")] = None,  # noqa: UP045
    time: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="TIME", help="Limit of one start, such as 24:00:00; a job goes on after it.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the scripts; write and send nothing.")] = False,
) -> None:
    """Send a chain of Slurm jobs, a recipe each, each after the one before has succeeded.

    A classifier without weights starts from the link before it.

    Example: `mae-scale submit pretrain/vit_huge_1600ep finetune/vit_huge_224 finetune/vit_huge_448 --nodes 16
    --out runs data.root=/data/imagenet/train data.val_root=/data/imagenet/val`
    """
    from mae_scale import submit as jobs

    shape = jobs.Shape(nodes, gpus_per_node, ntasks_per_node, cpus_per_task, partition, account, time)
    jobs.submit(recipes, shape, out, dry_run=dry_run)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run's folder: its newest whole one.")],
    out: Annotated[Path, typer.Argument(help="File to write: .safetensors or .pth.")],
    layout: Annotated[
        str,
        typer.Option(
            "--format", metavar="LAYOUT", help="official (the authors' release), timm, hf, or safetensors (our names)."
        ),
    ] = "official",
) -> None:
    """Write the weights of a checkpoint into one file; on any machine, whatever ranks and engine wrote it.

    Example: `mae-scale export runs/vit_huge vit_huge.pth --format official`
    """
    from mae_scale.checkpoints.export import FORMATS, checkpoint_model, export_weights, find_checkpoint

    if layout not in FORMATS:
        raise UsageError(f"--format {layout} is not known; expected {', '.join(FORMATS)}")
    folder = find_checkpoint(checkpoint)
    model, _ = checkpoint_model(folder)
    export_weights(model, out, layout)
    typer.echo(f"{out}: {layout} layout, from {folder}")


def main() -> None:
    """Entry point: errors that are explained become one line and an exit code, without a traceback."""
    # Gloo, of a peer that is lost, would print a C++ stack trace before our line that names it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = EXIT_DONE
    try:
        run(app)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except (UsageError, RunError) as error:
        rank, code = os.environ.get("RANK", "0"), error.exit_code
        if rank == "0" or not error.on_all_ranks:
            print(f"error: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        code = 130
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILED
    if "RANK" in os.environ:
        from mae_scale.training.distributed import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
