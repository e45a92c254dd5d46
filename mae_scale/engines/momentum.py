"""The momentum encoder under any engine: a copy of the weights' moving average, filled from the ranks' parts of it.

Each rank keeps the average of its part of the master weights in float32 beside its moments, so that the average is
sharded, saved and resumed like them. Before each step the average is moved, and gathered into the objective's
`followers`, in their precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mae_scale.checkpoints.shards import Piece

BUCKET = 2**26
"""Elements gathered at a time, of all ranks."""


@dataclass(frozen=True)
class _Bucket:
    """What is sent and received in one collective: views that are copied one to the other."""

    sources: list[torch.Tensor]
    sent: list[torch.Tensor]
    received: list[torch.Tensor]
    targets: list[torch.Tensor]


class Followers:
    """Fills tensors from the pieces of them that the ranks hold. All ranks make one, and call it, together."""

    def __init__(
        self, held: Sequence[Piece], followers: Mapping[str, nn.Parameter], *, dtype: torch.dtype, replicated: bool
    ):
        """held: this rank's pieces; followers: what is filled, by name, on one device, converted to dtype here;
        replicated: every rank holds everything, and nothing is sent.
        """
        held = [piece for piece in held if piece.name in followers and piece.data.numel()]
        for follower in followers.values():
            follower.data = follower.data.to(dtype)
        targets = {name: follower.data.view(-1) for name, follower in followers.items()}
        self._buckets: list[_Bucket] = []
        self._sent = self._received = torch.empty(0)
        if replicated:
            into = [targets[p.name][p.start : p.start + p.data.numel()] for p in held]
            self._buckets.append(_Bucket([p.data for p in held], into, [], []))
            return
        mine = [(piece.name, piece.start, piece.data.numel()) for piece in held]
        world_size = torch.distributed.get_world_size()
        tables: list[list[tuple[str, int, int]]] = [[] for _ in range(world_size)]
        torch.distributed.all_gather_object(tables, mine)
        longest = max(sum(n for _, _, n in table) for table in tables)
        size = max(1, min(longest, BUCKET // world_size))
        like = next(iter(targets.values()))
        self._sent, self._received = like.new_zeros(size), like.new_empty(world_size, size)
        for begin in range(0, longest, size):
            bucket = _Bucket([], [], [], [])
            for piece, place, start, n in _stretches(mine, begin, size):
                bucket.sources.append(held[piece].data[start : start + n])
                bucket.sent.append(self._sent[place : place + n])
            for row, table in zip(self._received, tables, strict=True):
                for piece, place, start, n in _stretches(table, begin, size):
                    name, first, _ = table[piece]
                    bucket.received.append(row[place : place + n])
                    bucket.targets.append(targets[name][first + start : first + start + n])
            self._buckets.append(bucket)

    @torch.no_grad()
    def fill(self) -> None:
        """Copy all ranks' pieces, as they are now, into the followers."""
        for bucket in self._buckets:
            if bucket.sources:
                torch._foreach_copy_(bucket.sent, bucket.sources)
            if bucket.targets:
                torch.distributed.all_gather_into_tensor(self._received.view(-1), self._sent)
                torch._foreach_copy_(bucket.targets, bucket.received)


def move_averages(averages: list[torch.Tensor], weights: list[torch.Tensor], decay: float) -> None:
    """Move averages towards the weights in place: average = decay x average + (1 - decay) x weight."""
    if averages:
        torch._foreach_lerp_(averages, weights, 1 - decay)


def _stretches(table: Sequence[tuple[str, int, int]], begin: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield what lies in [begin, begin + size) of a rank's pieces one after the other.

    As (row of the table, place in the bucket, first element of the piece, number of elements).
    """
    position = 0
    for row, (_, _, n) in enumerate(table):
        first, last = max(position, begin), min(position + n, begin + size)
        if first < last:
            yield row, first - begin, first - position, last - first
        position += n
