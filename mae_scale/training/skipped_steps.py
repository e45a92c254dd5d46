"""Steps with non-finite gradients, and when they make a run roll back."""

import logging
from collections.abc import Callable

from mae_scale.training.context import RunContext

log = logging.getLogger("mae_scale")


class RollBack(Exception):
    """Too many steps in a row, up to step `done`, had gradients that are not finite."""

    def __init__(self, count: int, done: int):
        super().__init__(f"{count} steps in a row, up to step {done}, had gradients that are not finite")
        self.done = done


class SkippedSteps:
    """Counts the steps whose gradients were not finite.

    Whether a step was one is read when the next has been launched, so that the device is never without work. Nothing
    depends on it in between: such a step has changed nothing.
    """

    def __init__(self, context: RunContext):
        self._context = context
        self._unread: tuple[int, Callable[[], bool | float]] | None = None
        self._last = 0
        self.in_a_row = 0

    def add(self, done: int, skipped: Callable[[], bool | float]) -> None:
        """Note step `done`, to be settled later."""
        self._unread = done, skipped

    def settle(self) -> None:
        """Read what was noted; wait for that step."""
        if self._unread is None:
            return
        (self._last, skipped), self._unread = self._unread, None
        if not skipped():
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self._context.events.add("skipped_step", self._last)
        log.warning("step %d: the gradients are not finite; nothing was updated", self._last)

    def check(self) -> None:
        """Raise RollBack when there were too many in a row up to the last step that was read.

        What a step launched since has done is undone too; its batch comes again and is not skipped.
        """
        if self.in_a_row >= self._context.recipe.checkpoint.rollback_after_skips:
            raise RollBack(self.in_a_row, self._last)
