"""Where a run is tracked, and that a database is made whole or not at all."""

import pytest

from data_pipeline.errors import UsageError
from mae_scale.passwords import redacted, without_password
from mae_scale.tracking.mlflow_uri import artifact_location, hide_password, tracking_uri


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


HOLDING_A_PASSWORD = {  # shown, stored
    "http://me:secret@host:5000/path": ("http://me:***@host:5000/path", "http://me@host:5000/path"),
    "https://me:sec@ret@host": ("https://me:***@host", "https://me@host"),
    "postgresql://me:sec/ret@host/db": ("postgresql://me:***@host/db", "postgresql://me@host/db"),
    "mysql+pymysql://me@corp:secret@host/db": (
        "mysql+pymysql://me@corp:***@host/db",
        "mysql+pymysql://me@corp@host/db",
    ),
    "postgresql://h/db?user=me&password=secret": (
        "postgresql://h/db?user=me&password=***",
        "postgresql://h/db?user=me",
    ),
    "postgresql://h/db?password=secret&user=me": (
        "postgresql://h/db?password=***&user=me",
        "postgresql://h/db?user=me",
    ),
    "postgresql://h/db?password=secret": ("postgresql://h/db?password=***", "postgresql://h/db"),
}
WITHOUT = ["http://host:5000/path", "http://me@host", "sqlite:////a:b@c/mlflow.db", "postgresql://h/db?sslmode=require"]


@pytest.mark.parametrize("uri", HOLDING_A_PASSWORD)
def test_passwords_are_neither_shown_nor_stored(uri):
    shown, stored = HOLDING_A_PASSWORD[uri]
    assert (redacted(f"to {uri} now"), without_password(uri)) == (f"to {shown} now", stored)
    assert without_password(stored) == stored


@pytest.mark.parametrize("uri", WITHOUT)
def test_a_uri_without_a_password_stays_as_it_is(uri):
    assert redacted(uri) == without_password(uri) == uri


def test_a_stored_uri_takes_the_password_of_the_environment_where_both_name_one_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/db")
    assert tracking_uri("postgresql://me@host/db", tmp_path) == "postgresql://me:secret@host/db"
    assert tracking_uri("postgresql://me@other/db", tmp_path) == "postgresql://me@other/db"


@pytest.mark.parametrize(
    "uri", ["http://me:se/cret@host", "http://me:12/cret@host", "http://me:se#cret@host", "http://"]
)
def test_an_address_that_a_password_has_cut_short_is_refused_without_showing_it(tmp_path, uri):
    with pytest.raises(UsageError, match="%2F") as error:
        tracking_uri(uri, tmp_path)
    assert "cret" not in str(error.value)


def test_ranks_get_a_password_by_the_environment():
    words = ["pretrain", "demo", "tracking.uri=http://me:secret@host", "seed=1"]
    assert hide_password(words) == (
        ["pretrain", "demo", "tracking.uri=http://me@host", "seed=1"],
        {"MLFLOW_TRACKING_URI": "http://me:secret@host"},
    )
    for option in (["--tracking-uri", "http://me:secret@host"], ["--tracking-uri=http://me:secret@host"]):
        shown, environment = hide_password(["pretrain", *option, "seed=1"])
        assert shown == ["pretrain", *(word.replace(":secret", "") for word in option), "seed=1"]
        assert environment == {"MLFLOW_TRACKING_URI": "http://me:secret@host"}
    assert hide_password(["tracking.uri=http://host", "seed=1"]) == (
        ["tracking.uri=http://host", "seed=1"],
        {},
    )
