"""Write files whole or not at all: the one way of writing everything that others read.

The content goes to a temporary file beside the final one (`.NAME.*.tmp`), is synchronised to the disk and renamed; the
folder is synchronised too, so that after a power failure the name has the old content or the new. An error or
Ctrl-C removes the temporary file; only a process that is killed leaves one behind.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".tmp"


def temporary_beside(path: Path) -> Path:
    """Return a new name for a temporary file in the folder of `path`; no other process or machine has it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file whose content becomes that of `path` when the block ends without an error. Raises OSError."""
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all. Raises OSError."""
    with whole_file(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON with a newline at the end, whole or not at all. Raises OSError."""
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")


def create_whole(path: Path, content: bytes) -> bool:
    """Write `content` to `path`, whole or not at all; return False, and change nothing, when `path` exists.

    Of several processes one succeeds, wherever the file system has hard links. Raises OSError.
    """
    temporary = temporary_beside(path)
    try:
        write_atomically(temporary, content)
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if path.exists():
            return False
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
