"""Where a plan puts an image's pixels, for what is annotated in it."""

from data_pipeline.annotations.placing import Placing
from data_pipeline.plan import BatchPlan


def placing_of(row: BatchPlan) -> Placing:
    """Return where a one-row plan, whose crop is the whole image, puts its pixels."""
    return Placing.of(row.regions[0], row.filled[0], int(row.flips[0]))
