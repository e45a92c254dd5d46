"""The settings under which MLflow is used: its environment variables, its loggers, and its errors in one line."""

import logging
import os

from mae_scale.passwords import redacted

# A request gives up soon and the thread tries again; a user's own values stay.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
QUIETED = {"mlflow": logging.ERROR, "alembic": logging.WARNING, "urllib3.connectionpool": logging.ERROR}
CONNECTION_ERRORS = (
    "Connection refused",
    "Connection aborted",
    "timed out",
    "name resolution",
    "Name or service not known",
)


def set_environment() -> None:
    """Set the environment variables that MLflow reads; those that are set already stay."""
    for name, default in ENVIRONMENT.items():
        os.environ.setdefault(name, default)


def quieten_loggers() -> None:
    """Silence the loggers of MLflow and its libraries; call it after MLflow's import, which sets their levels."""
    for name, level in QUIETED.items():
        logging.getLogger(name).setLevel(level)


def reason(error: Exception) -> str:
    """Return an error of MLflow as one short line; of the layers of a connection's errors the operating system's."""
    text = str(error).strip()
    for phrase in CONNECTION_ERRORS:
        if phrase in text:
            return phrase
    first_line = text.splitlines()[0] if text else ""
    return redacted(f"{type(error).__name__}: {first_line[:200].rstrip('.')}".removesuffix(": "))
