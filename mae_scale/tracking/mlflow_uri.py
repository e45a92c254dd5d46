"""The URI of a run's MLflow store, and the place of that store's files. Imports nothing of MLflow."""

import os
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from data_pipeline.errors import UsageError
from mae_scale.passwords import redacted, without_password

VARIABLE, OVERRIDE, OPTION = "MLFLOW_TRACKING_URI", "tracking.uri", "--tracking-uri"
OFF = ("none", "off")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SCHEMES = ("http", "https", "databricks", "databricks-uc", "uc", *DATABASES)


def tracking_uri(value: str | None, out_dir: Path) -> str | None:
    """Return the tracking URI: `value`, else MLFLOW_TRACKING_URI, else SQLite in the folder above `out_dir`.

    A `value` without a password takes that of MLFLOW_TRACKING_URI where both name the same store: a run's files hold no
    password. None when tracking is off ("none" or "off"). Raises UsageError for a URI that MLflow cannot track to.
    """
    known = os.environ.get(VARIABLE, "").strip()
    uri = (value or known).strip()
    if uri == without_password(known):
        uri = known
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
    if scheme in ("http", "https") and not _is_web_address(uri):
        raise UsageError(
            "the tracking URI is no address that can be read; expected http://host:port or http://user:password@host, "
            "with the password's / @ : # ? as %2F %40 %3A %23 %3F"
        )
    return uri


def hide_password(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return a command's arguments without the password of its tracking URI, and variables that hold it instead."""
    shown: list[str] = []
    environment = {}
    for argument in arguments:
        key, sign, uri = argument.partition("=")
        if shown and shown[-1] == OPTION:
            key, sign, uri = "", "", argument
        elif key not in (OVERRIDE, OPTION):
            uri = ""
        if uri != without_password(uri):
            environment[VARIABLE] = uri
            argument = f"{key}{sign}{without_password(uri)}"
        shown.append(argument)
    return shown, environment


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite URI; None for any other."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def artifact_location(uri: str, out_dir: Path) -> str | None:
    """Return the URI of a new experiment's files; None where a server decides.

    For a database without a server MLflow would take the working folder; this is beside SQLite's file, or above
    `out_dir`.
    """
    if _scheme(uri) not in DATABASES:
        return None
    database = sqlite_path(uri)
    beside = database.parent if database is not None else Path(out_dir).absolute().parent
    return (beside / "mlartifacts").as_uri()


def _is_web_address(uri: str) -> bool:
    """Return whether a URI has a host and a clean path: a raw / or # in a password would end the host."""
    try:
        address = urlsplit(uri)
        return bool(address.hostname) and address.port != 0 and "@" not in address.path + address.fragment
    except ValueError:
        return False


def _scheme(uri: str) -> str:
    return uri.split(":", 1)[0].split("+")[0]
