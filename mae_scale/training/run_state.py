"""What has become of a run, by its folder alone."""

from __future__ import annotations

from pathlib import Path

from mae_scale.tracking.metrics_log import parse_rows
from mae_scale.training.run_lock import seems_held

NOT_STARTED, RUNNING, STOPPED, DONE, STOPPED_EARLY, KILLED = (
    "not started",
    "running",
    "stopped",
    "done",
    "stopped early",
    "killed",
)
ENDS = {"done": DONE, "nothing to do": DONE, "stopped early": STOPPED_EARLY}
"""The reasons of the event `end`."""


def run_state(out: Path) -> str:
    """Return one of the states above, or "failed: REASON"."""
    path = out / "events.jsonl"
    if seems_held(out):
        return RUNNING
    if not path.exists():
        return NOT_STARTED
    rows = [row for _, row in parse_rows(path.read_bytes()) if row is not None]
    last = rows[-1] if rows else {"event": "start"}
    if last["event"] == "end":
        return ENDS.get(last["reason"], STOPPED_EARLY)
    if last["event"] == "failure":
        return f"failed: {last.get('reason')}"
    return STOPPED if last["event"] == "stop" else KILLED
