"""MLflow's SQLite file appears whole or not at all."""

import pytest

from mae_scale.tracking.sqlite_database import new_sqlite_file


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
