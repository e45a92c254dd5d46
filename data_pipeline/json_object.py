"""JSON files that users name: an object, or one line that says why not."""

import json
from pathlib import Path
from typing import Any

from data_pipeline.errors import UsageError


def read_object(path: Path, source: str) -> dict[str, Any]:
    """Return the object in a JSON file; raise UsageError, which begins with `source`, for any other content."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{source} holds a {type(found).__name__}, expected an object")
    return found
