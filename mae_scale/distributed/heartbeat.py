"""Communication between ranks beside the training: requests, heartbeats, and the name of a rank that is lost.

Small CPU tensors over a Gloo group of its own, so that no GPU is waited for; heartbeats in the rendezvous store.
The Gloo group speaks first: NCCL's own timeout is twice as long (distributed.collectives.process_group), and by then
it ends the process without a word on who is missing.
"""

import contextlib
import os
import queue
import re
import threading
import time
from datetime import timedelta
from types import TracebackType

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, and not in __all__

from data_pipeline.errors import RunError
from mae_scale.distributed.ranks import Ranks

SILENCE_INTERVALS = 2.5
"""Silence, in intervals between heartbeats, after which a rank counts as lost."""
ANSWER_S = 2.0
"""Longest wait for the store's answer."""
LEFT, FOLLOWED = "left", "followed"
"""Last beats of a rank that has left by itself, and of one that has left because it lost another."""
LOST = re.compile(r"time[d ]*out|closed|closure|reset|refused|broken pipe|connect|network|remote p|abort", re.I)
"""Words of Gloo's and NCCL's errors about a lost peer, and not about tensors that do not fit."""


class Control:
    """A rank's heartbeat and its agreements with the others; a context manager inside process_group(ranks, timeout_s).

    Every rank enters it. An error that leaves the block because another rank is lost becomes a RunError that names it
    (see explained()).
    """

    def __init__(self, ranks: Ranks, timeout_s: float):
        self._ranks, self._timeout = ranks, timedelta(seconds=timeout_s)
        # At most 1.5 s: a silence and twice that for the others then fit into the launcher's grace.
        self._interval_s = min(1.5, max(0.2, timeout_s / 10))
        self._keys = [f"mae_scale/heart/{rank}" for rank in range(ranks.world_size)]
        self._stop = threading.Event()
        self._lost: list[int] | None = None
        self._heart = threading.Thread(target=self._beat, name="mae-scale-heart", daemon=True)

    def __enter__(self) -> "Control":
        # Its own connection: a blocking call of the training's holds the lock of the one it uses.
        self._store = self._connect()
        self._store.set(self._keys[self._ranks.rank], "0")
        self._group = torch.distributed.new_group(backend="gloo", timeout=self._timeout)
        self._asked: torch.Tensor | None = None
        self._exchange: torch.distributed.Work | None = None
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self.forget()
            except RuntimeError as lost:
                error = lost
        explanation = None if error is None else self.explained(error)
        # Joined, for a thread that returns from the store into an interpreter that is ending aborts the process.
        self._stop.set()
        self._heart.join(ANSWER_S)
        with contextlib.suppress(torch.distributed.DistError):  # its host may have left before
            self._store.set(self._keys[self._ranks.rank], LEFT if self._lost is None else FOLLOWED)
        if self._lost is not None and self._ranks.is_first and not _agent_hosts_store():
            self._stay_for_the_others(self._lost)
        if explanation is not None:
            raise explanation from None

    def agree(self, *flags: bool) -> list[bool]:
        """Return each flag of the previous call, True when it was on any rank; all False at the first call.

        All ranks call it once per step, with equally many flags. The next call answers this one: the ranks exchange
        flags while they train, and wait only for a rank that is more than a step behind.
        """
        before, asked = self._answer(), torch.tensor(flags, dtype=torch.uint8)
        maximum = torch.distributed.ReduceOp.MAX
        self._asked = asked
        self._exchange = torch.distributed.all_reduce(asked, maximum, group=self._group, async_op=True)
        return [False] * len(flags) if before is None else [bool(flag) for flag in before.tolist()]

    def any(self, flag: bool) -> bool:
        """Return whether the flag is True on any rank, now. All ranks call it, and wait for each other."""
        self.agree(flag)
        return bool(self._answer())

    def meet(self) -> None:
        """Wait until all ranks have called the last agree(); call it before a wait for the device.

        A GPU that waits for a lost rank does not report it; this wait has a timeout, and names the rank.
        """
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.wait()

    def forget(self) -> None:
        """Make the next agree() return all False, when its flags have been dealt with. All ranks call it."""
        self._answer()

    def _answer(self) -> torch.Tensor | None:
        """Return the flags of the last agree() over all ranks; None when there are none."""
        self.meet()
        answer, self._asked = self._asked, None
        return answer

    def silent_ranks(self) -> list[int]:
        """Return the ranks that no longer answer; takes 2.5 heartbeats. Call it after a collective has failed.

        These are the ranks killed or stopped; if there are none, those that have left, but not because they had lost
        another. When the store does not answer: rank 0 if it hosts the store, none under torchrun, whose agent does.
        """
        silent_host = [] if _agent_hosts_store() else [0]
        before = self._beats()
        if before is None:
            return silent_host
        time.sleep(SILENCE_INTERVALS * self._interval_s)
        after = self._beats()
        if after is None:
            return silent_host
        all_ranks = range(self._ranks.world_size)
        stopped = [rank for rank in all_ranks if before[rank] == after[rank] and after[rank] not in (LEFT, FOLLOWED)]
        return stopped or [rank for rank in all_ranks if after[rank] == LEFT]

    def explained(self, error: BaseException) -> RunError | None:
        """Return a one-line error for that of a collective that lost a rank, after 2.5 heartbeats; None for others."""
        if not _lost_touch(error):
            return None
        self._lost = [rank for rank in self.silent_ranks() if rank != self._ranks.rank]
        if self._lost:
            names = ", ".join(map(str, self._lost))
            who = f"rank {names} no longer answers" if len(self._lost) == 1 else f"ranks {names} no longer answer"
            what = f"{who} (ended, killed, or hanging for more than {self._timeout.total_seconds():g} s)"
        else:
            what = f"the ranks lost touch with each other: {_first_line(error)}"
        return RunError(f"{what}; the same command goes on from the last checkpoint")

    def _connect(self) -> TCPStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return TCPStore(address, port, is_master=False, timeout=self._timeout)

    def _beat(self) -> None:
        """Beat until stopped, in a thread. `set` does not wait for an answer, so a stopped host does not block it."""
        count = 0
        while not self._stop.wait(self._interval_s):
            count += 1
            try:
                self._store.set(self._keys[self._ranks.rank], str(count))
            except torch.distributed.DistError:
                return  # the host has ended; the next collective will fail

    def _beats(self) -> list[str] | None:
        """Return every rank's last beat; None when the store does not answer.

        In a thread: a read from a host that is stopped waits for ever, whatever its timeout.
        """
        answer: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()

        def read() -> None:
            try:
                answer.put([beat.decode() for beat in self._connect().multi_get(self._keys)])
            except torch.distributed.DistError:
                answer.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            return answer.get(timeout=ANSWER_S)
        except queue.Empty:
            return None

    def _stay_for_the_others(self, lost: list[int]) -> None:
        """Wait while the others read who is lost, for the store ends with this process."""
        others = set(range(1, self._ranks.world_size)) - set(lost)
        deadline = time.monotonic() + 2 * SILENCE_INTERVALS * self._interval_s
        while time.monotonic() < deadline:
            beats = self._beats()
            if beats is None or all(beats[rank] in (LEFT, FOLLOWED) for rank in others):
                return
            time.sleep(self._interval_s / 4)


def _lost_touch(error: BaseException) -> bool:
    """Return whether the error came out of Gloo, NCCL or the store because a peer or the network is gone."""
    if isinstance(error, (torch.distributed.DistNetworkError, torch.distributed.DistStoreError)):
        return True
    collective = isinstance(error, torch.distributed.DistBackendError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )
    return collective and LOST.search(str(error)) is not None


def _first_line(error: BaseException) -> str:
    """Return an error's first line without the source file that Gloo puts before it."""
    return re.sub(r"^\[[^]]*\] *", "", str(error).partition("\n")[0])


def _agent_hosts_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
