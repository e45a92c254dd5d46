"""Fixtures of the integration tests."""

import pytest

from tests.integration.mlflow_server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real MLflow server on loopback."""
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()
