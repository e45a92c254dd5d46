"""The batch rule: global batch = world size x micro-batch x accumulation."""

from dataclasses import dataclass

from data_pipeline.errors import UsageError


@dataclass(frozen=True)
class BatchLayout:
    """The division of a global batch among ranks and micro-batches."""

    global_batch: int
    world_size: int
    micro_batch: int
    accumulation: int
    """Micro-batches per step and rank."""

    def positions(self, rank: int) -> slice:
        """Return the positions of a global batch that `rank` has. Raises UsageError when there is no such rank."""
        if not 0 <= rank < self.world_size:
            raise UsageError(f"rank {rank} of {self.world_size} ranks; expected 0 to {self.world_size - 1}")
        share = self.global_batch // self.world_size
        return slice(rank * share, (rank + 1) * share)


def batch_layout(global_batch: int, world_size: int = 1, micro_batch: int | None = None) -> BatchLayout:
    """Return the division of a global batch among ranks and micro-batches.

    The micro-batch is `micro_batch`, at most a rank's share; by default the whole share. Raises UsageError, naming
    numbers that would fit, when these do not divide.
    """
    if min(global_batch, world_size, 1 if micro_batch is None else micro_batch) < 1:
        raise UsageError(
            f"data.global_batch={global_batch}, engine.micro_batch={micro_batch}, {world_size} ranks: none may be "
            "below 1"
        )
    if global_batch % world_size:
        above = global_batch + world_size - global_batch % world_size
        fits = _listed(sorted({global_batch - global_batch % world_size or above, above}))
        ranks = _around(_divisors(global_batch), world_size)
        raise UsageError(
            f"data.global_batch={global_batch} is not divisible by {world_size} ranks; with {world_size} ranks "
            f"{fits} would fit, with this batch {_listed(ranks)} ranks"
        )
    share = global_batch // world_size
    micro = share if micro_batch is None else min(micro_batch, share)
    if share % micro:
        raise UsageError(
            f"engine.micro_batch={micro} does not divide a rank's share of {share} images "
            f"(data.global_batch={global_batch} over {world_size} ranks); "
            f"engine.micro_batch={_listed(_around(_divisors(share), micro))} would fit"
        )
    return BatchLayout(global_batch, world_size, micro, share // micro)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _around(choices: list[int], wanted: int) -> list[int]:
    """Return up to four choices nearest to `wanted`, in ascending order."""
    return sorted(sorted(choices, key=lambda c: abs(c - wanted))[:4])


def _listed(numbers: list[int]) -> str:
    *rest, last = [str(n) for n in numbers]
    return f"{', '.join(rest)} or {last}" if rest else last
