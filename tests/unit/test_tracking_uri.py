"""Where a run is tracked, and that a database is made whole or not at all."""

import pytest

from mae_scale.errors import UsageError
from mae_scale.tracking.uri import artifact_location, new_sqlite_file, redacted, tracking_uri


@pytest.fixture(autouse=True)
def _no_uri_in_the_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)


def test_uri_is_the_value_else_the_environment_else_sqlite_above_the_run(tmp_path, monkeypatch):
    assert tracking_uri(None, tmp_path / "run") == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(None, tmp_path) == "http://tracking:5000"
    assert tracking_uri("https://other", tmp_path) == "https://other"


@pytest.mark.parametrize("off", ["off", "none", "None", "OFF"])
def test_tracking_can_be_switched_off_in_spite_of_the_environment(tmp_path, monkeypatch, off):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(off, tmp_path) is None


@pytest.mark.parametrize("uri", ["/some/mlruns", "mlruns", "file:///some/mlruns", "localhost:5000", "htp://host"])
def test_uri_that_mlflow_cannot_track_to_is_refused_before_training(tmp_path, uri):
    with pytest.raises(UsageError, match="http://host:port"):
        tracking_uri(uri, tmp_path)


def test_files_of_a_bare_database_are_beside_it_and_a_server_decides_itself(tmp_path):
    assert artifact_location("sqlite:////data/mlflow.db", tmp_path) == "file:///data/mlartifacts"
    assert artifact_location("postgresql+psycopg2://host/db", tmp_path / "run") == ((tmp_path / "mlartifacts").as_uri())
    assert artifact_location("http://tracking:5000", tmp_path) is None


def test_passwords_are_not_shown():
    assert redacted("to postgresql://me:secret@host/db now") == "to postgresql://me:***@host/db now"
    assert redacted("http://host:5000/path") == "http://host:5000/path"


def test_database_whose_making_fails_halfway_is_not_there(tmp_path):
    def die(uri):
        with open(uri.removeprefix("sqlite:///"), "w") as file:
            file.write("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new_sqlite_file(f"sqlite:///{tmp_path / 'mlflow.db'}", die)
    assert list(tmp_path.iterdir()) == []


def test_database_of_another_run_that_was_first_is_kept(tmp_path):
    path = tmp_path / "mlflow.db"

    def fill(uri):
        path.write_text("theirs")
        with open(uri.removeprefix("sqlite:///"), "w") as file:
            file.write("ours")

    new_sqlite_file(f"sqlite:///{path}", fill)
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]
