"""Human-readable numbers."""

import math


def duration(seconds: float | None) -> str:
    """Return hours, minutes and seconds, with days in front; dashes when unknown."""
    if seconds is None:
        return "--:--:--"
    minutes, second = divmod(math.ceil(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour:02}:{minute:02}:{second:02}"
