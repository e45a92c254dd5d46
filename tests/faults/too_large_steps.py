"""`mae-scale` with learning rates FACTOR times too large in the updates STEPS="first:last" (last left out)."""

import os

from mae_scale.cli.main import main
from mae_scale.training import context

FIRST, LAST = map(int, os.environ["STEPS"].split(":"))
FACTOR = float(os.environ["FACTOR"])
scheduled = context.learning_rate


def too_large(step: int, **schedule) -> float:
    return scheduled(step, **schedule) * (FACTOR if FIRST <= step < LAST else 1)


context.learning_rate = too_large
main()
