"""Plans in tests: an index of image sizes alone, which is all that they need, and their content as bytes."""

import numpy as np


class Sizes:
    """An index of `count` images, random heights and widths if none are given."""

    def __init__(self, count=103, height=None, width=None):
        random = np.random.default_rng(0)
        self.height, self.width = (
            (np.full(count, side) if side else random.integers(20, 600, count)).astype(np.int32)
            for side in (height, width)
        )

    def __len__(self):
        return len(self.height)


def columns(plan) -> bytes:
    return b"".join(np.ascontiguousarray(column).tobytes() for column in vars(plan).values())
