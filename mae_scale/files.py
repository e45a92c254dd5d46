"""Files that another process never sees in part."""

import json
import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, fsync, rename: it holds the old content or the new, never a part. Raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Pretty JSON with a newline at the end, whole or not at all. Raises OSError."""
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
