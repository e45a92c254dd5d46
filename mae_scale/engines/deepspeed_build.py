"""DeepSpeed's start-up: its environment variables, its import, its C++ extensions, its process group."""

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator
from datetime import timedelta
from types import ModuleType

import torch

from data_pipeline.errors import UsageError

OLDEST = (0, 19, 7)
"""The first DeepSpeed that has zero_optimization.compute_grad_norm (see deepspeed_config.checks_gradients)."""


def set_environment() -> None:
    """Set the environment variables that DeepSpeed reads while it is imported; those that are set already stay."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed, which takes seconds, without its messages; raise UsageError when it is too old."""
    for talkative in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    found = tuple(int(number) for number in re.findall(r"\d+", deepspeed.__version__)[:3])
    if found < OLDEST:
        raise UsageError(
            f"DeepSpeed {deepspeed.__version__} is installed; {'.'.join(map(str, OLDEST))} or newer is needed, which "
            "can leave the gradient's norm to the engine: pip install --upgrade deepspeed",
            on_all_ranks=True,
        )
    if not torch.cuda.is_available():
        # Else a C++ helper is compiled for up to 75 s at the first start: an all-reduce for inference in one machine's
        # memory. Training never calls it; all of its collectives are torch's.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join_process_group(deepspeed: ModuleType, timeout: timedelta) -> None:
    """Let DeepSpeed use torch's process group, and give its own group of all ranks the same timeout, not 30 minutes."""
    from deepspeed.utils import groups

    with without_prints():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    if groups._WORLD_GROUP is None:
        groups._WORLD_GROUP = torch.distributed.new_group(timeout=timeout)


@contextlib.contextmanager
def without_prints() -> Iterator[None]:
    """Return a block that discards standard output, where DeepSpeed prints while it starts."""
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield
