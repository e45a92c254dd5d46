"""One relaunch of a command line as ranks on this machine."""

import sys

from mae_scale.distributed.ranks import launched


def starts_ranks(nproc: int) -> bool:
    """Return whether this process is to start ranks, rather than to work as one of them or alone."""
    return nproc > 1 and not launched()


def relaunch(nproc: int, **environment: str) -> int:
    """Run this command line as `nproc` local ranks, which find themselves launched; return the exit code."""
    from mae_scale.launch.local import launch_local_ranks

    return launch_local_ranks(nproc, sys.argv[1:], environment=environment)
