"""Which MLflow store a run is tracked in, and where that store keeps files. Imports nothing of MLflow."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from mae_scale.errors import UsageError

OFF = ("none", "off")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SCHEMES = ("http", "https", "databricks", "databricks-uc", "uc", *DATABASES)


def tracking_uri(value: str | None, out_dir: Path) -> str | None:
    """Where the run is tracked: `value`, else MLFLOW_TRACKING_URI, else SQLite in the folder above `out_dir`.

    None when tracking is off ("none" or "off"). Raises UsageError for a URI that MLflow cannot track to.
    """
    uri = (value or os.environ.get("MLFLOW_TRACKING_URI") or "").strip()
    if uri.lower() in OFF:
        return None
    if not uri:
        return f"sqlite:///{Path(out_dir).absolute().parent / 'mlflow.db'}"
    scheme = _scheme(uri)
    plugins = {entry.name for entry in metadata.entry_points(group="mlflow.tracking_store")}
    is_folder = scheme == "file" or ("://" not in uri and scheme not in SCHEMES)
    if is_folder:
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
            raise UsageError(
                f"tracking URI {redacted(uri)!r} is a folder, which MLflow no longer writes to; "
                "give http://host:port, sqlite:////path/mlflow.db or off"
            )
    elif scheme not in SCHEMES and scheme not in plugins:
        raise UsageError(
            f"tracking URI {redacted(uri)!r} has the unknown scheme {scheme!r}; "
            "give http://host:port, sqlite:////path/mlflow.db or off"
        )
    return uri


def redacted(text: str) -> str:
    """`text` without the passwords of its URIs."""
    return re.sub(r"(://[^:/@\s]*):[^@/\s]+@", r"\1:***@", text)


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI; None for any other."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def artifact_location(uri: str, out_dir: Path) -> str | None:
    """Where a new experiment keeps its files, as a URI; None: a server decides.

    For a database without a server MLflow would take the working folder; here it is beside SQLite's file, or
    above `out_dir`.
    """
    if _scheme(uri) not in DATABASES:
        return None
    database = sqlite_path(uri)
    beside = database.parent if database is not None else Path(out_dir).absolute().parent
    return (beside / "mlartifacts").as_uri()


def new_sqlite_file(uri: str, fill: Callable[[str], object]) -> None:
    """Make a SQLite URI's database if it is not there, whole or not at all; `fill(uri)` makes the tables.

    MLflow fills a new file table by table for seconds; a process killed in that time leaves one that no later
    start can open.
    """
    path = sqlite_path(uri)
    if path is None or path.exists():
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with tempfile.TemporaryDirectory(prefix="mlflow-") as folder:
        draft = Path(folder) / "mlflow.db"
        fill(f"sqlite:///{draft}")
        try:
            shutil.copyfile(draft, beside)
            os.link(beside, path)
        except FileExistsError:  # another run in the same folder was first
            return
        except OSError:  # a file system without links
            beside.rename(path)
        finally:
            beside.unlink(missing_ok=True)


def _scheme(uri: str) -> str:
    return uri.split(":", 1)[0].split("+")[0]
