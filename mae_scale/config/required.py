"""Keys of a recipe that a command cannot do without."""

from typing import TypeVar

from data_pipeline.errors import UsageError

Value = TypeVar("Value")


def required(value: Value | None, key: str, advice: str) -> Value:
    """Return a key's value. Raises UsageError, with what to do, when it is not set."""
    if value is None:
        raise UsageError(f"{key} is not set; {advice}")
    return value
