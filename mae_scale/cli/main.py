"""The command line: parse, call, print.

Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 75 stopped on request, 130 ended by Ctrl-C.
"""

import os
import sys
import traceback
from typing import Any

import typer

from data_pipeline.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, RunError, UsageError
from mae_scale.cli.checkpoints import checkpoints_app, export_app
from mae_scale.cli.compare import compare_app
from mae_scale.cli.data import data_app
from mae_scale.cli.demo import demo_app
from mae_scale.cli.doctor import doctor_app
from mae_scale.cli.help import common, run
from mae_scale.cli.measure import measure_app
from mae_scale.cli.paper import paper_app
from mae_scale.cli.plan import plan_app
from mae_scale.cli.recipes import recipes_app
from mae_scale.cli.report import report_app
from mae_scale.cli.scaling import scaling_app
from mae_scale.cli.slurm import slurm_app
from mae_scale.cli.sweep import sweep_app
from mae_scale.cli.tokens import tokens_app
from mae_scale.cli.train import train_app
from mae_scale.distributed.ranks import leave, say_error, this_rank
from mae_scale.distributed.stop_requests import INTERRUPTED

WRONG_ARGUMENTS: type[Any] = typer.BadParameter.__mro__[1]  # click's UsageError, wherever this typer has it from

app = typer.Typer(
    name="mae-scale",
    callback=common,
    help="Masked-autoencoder pre-training of Vision Transformers, from one laptop to a Slurm cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
apps = (
    doctor_app,
    demo_app,
    paper_app,
    train_app,
    plan_app,
    measure_app,
    tokens_app,
    compare_app,
    report_app,
    sweep_app,
    slurm_app,
    export_app,
)
for family in apps:
    app.add_typer(family)
app.add_typer(data_app, name="data", no_args_is_help=True)
app.add_typer(checkpoints_app, name="checkpoints", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes", no_args_is_help=True)
app.add_typer(scaling_app, name="scaling", no_args_is_help=True)


def main() -> None:
    """Run the command line in sys.argv; an explained error becomes one line per job and an exit code."""
    # Gloo, of a peer that is lost, would print a C++ stack trace before our line that names it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code: int | None = EXIT_DONE
    try:
        code = run(app, speaks=this_rank().is_first)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except WRONG_ARGUMENTS as error:  # the first rank's has been said by typer
        code = error.exit_code
    except (UsageError, RunError) as error:
        code = error.exit_code
        say_error(error)
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILED
    if code == EXIT_INTERRUPTED:  # typer has taken the KeyboardInterrupt
        print(INTERRUPTED, file=sys.stderr)
    if "RANK" in os.environ:
        leave(code or EXIT_DONE)
    sys.exit(code)


if __name__ == "__main__":
    main()
