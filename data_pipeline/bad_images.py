"""Images that turn bad after indexing: the policy on them, and those found so far."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from data_pipeline.errors import BadImage, RunError, UsageError
from data_pipeline.folder_listing import folder_problem
from data_pipeline.index import Index

LISTED = 20  # bad images named in an error

log = logging.getLogger("data_pipeline")


@dataclass(frozen=True)
class BadImagePolicy:
    """The limit on bad images, as a share of the index (one is always allowed), and the action on each."""

    limit: float = 0.001
    action: Literal["replace", "stop"] = "replace"

    def __post_init__(self) -> None:
        if self.action not in ("replace", "stop"):
            raise UsageError(f"data.on_bad_image is '{self.action}'; expected replace or stop")


DEFAULT_POLICY = BadImagePolicy()


class BadImages:
    """The images of an index that this process has found bad: `found` maps their names to the reasons."""

    def __init__(self, index: Index, policy: BadImagePolicy):
        self._index, self._policy = index, policy
        self.allowed = max(1, int(policy.limit * len(index)))
        self.found: dict[str, str] = {}

    def add(self, image: int, error: BadImage) -> None:
        """Record a bad image, with a warning the first time.

        Raises RunError when the policy is to stop, the limit is exceeded or the data folder is gone.
        """
        index, name = self._index, self._index.name(image)
        if name in self.found:
            return
        if problem := folder_problem(index.root):
            raise RunError(
                f"{problem} any more; mount or restore it, the same command goes on from the last checkpoint"
            )
        self.found[name] = str(error)
        if self._policy.action == "stop":
            raise RunError(f"bad image {index.root}/{name}: {error}; data.on_bad_image is 'stop'")
        log.warning("bad image %s/%s: %s; another takes its place", index.root, name, error)
        self.check(self.found)

    def check(self, found: dict[str, str]) -> None:
        """Raise RunError naming the images in `found`, of this rank or of all ranks, when they exceed the limit."""
        if len(found) > self.allowed:
            raise RunError(
                f"{len(found)} images turned bad after indexing, more than data.bad_image_limit allows "
                f"({self._policy.limit:g} of {len(self._index)} images: {self.allowed}); restore them, or start a new "
                f"run (another --out), whose index leaves them out: {listed(found)}"
            )


def listed(found: dict[str, str]) -> str:
    """Return bad images and their reasons on one line."""
    shown = [f"{name} ({reason})" for name, reason in list(found.items())[:LISTED]]
    more = len(found) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")
