"""Through the command line: a data folder that is gone, and index files that are damaged."""

import shutil
import subprocess
import sys
import time

import pytest

from data_pipeline.index import INDEX_NAME, load_index
from tests import warm
from tests.image_types import encoded, photo
from tests.tiny import TINY, losses


@pytest.fixture
def images(tmp_path):
    """24 photographs."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(24):
        (folder / f"{number:02d}.jpg").write_bytes(encoded(photo().rotate(number), "JPEG"))
    return folder


def arguments(images, *more: str) -> list[str]:
    return [
        *TINY,
        f"data.root={images}",
        "data.global_batch=6",
        "model.image_size=32",
        "tracking.uri=off",
        *more,
    ]


def spoil(file, how: str) -> None:
    data = file.read_bytes()
    if how == "format":
        import json

        import numpy as np

        with np.load(file) as index:
            columns = dict(index)
        about = json.loads(columns["about"].tobytes()) | {"format": 99}
        np.savez(file, **columns | {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)})
    else:
        middle = len(data) // 2
        spoilt = {"empty": b"", "cut": data[:middle], "text": b"no index\n", "bytes": data[:middle] + b"\0" * 99}
        file.write_bytes(spoilt[how] + (data[middle + 99 :] if how == "bytes" else b""))


@pytest.mark.parametrize("how", ["empty", "cut", "text", "bytes", "format"])
@pytest.mark.parametrize("given", [False, True])
def test_a_damaged_cached_index_is_built_again_with_one_warning(images, tmp_path, call, caplog, how, given):
    file = tmp_path / "kept.npz" if given else images / INDEX_NAME
    option = ["--index", file] if given else []
    expected = call("data", "index", images, *option)
    digest = load_index(file).digest()
    spoil(file, how)
    caplog.clear()
    code, out, _ = call("data", "index", images, *option)
    assert (code, out) == (0, expected[1])
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"index {file} is damaged or of another format; it is built again"]
    assert load_index(file).digest() == digest
    assert call("data", "index", images, *option) == expected


def test_the_warning_reaches_the_terminal(images, mae_scale):
    (images / INDEX_NAME).write_bytes(b"no index")
    done = mae_scale("data", "index", images)
    assert (done.returncode, done.stderr.count("is built again")) == (0, 1)
    assert done.stdout.startswith("24 images")


def test_a_file_that_is_no_index_is_never_written_over(images, tmp_path, call):
    note = tmp_path / "notes.txt"
    note.write_text("mine")
    code, out, error = call("data", "index", images, "--index", note)
    assert code == 2, out
    assert "damaged or not an index" in error
    assert note.read_text() == "mine"


def test_a_damaged_index_of_a_run_is_built_again_only_where_the_order_stays(images, tmp_path, mae_scale, call):
    out = tmp_path / "run"
    start = ["pretrain", "demo", "--out", out, *arguments(images)]
    assert mae_scale(*start, "schedule.stop_after_steps=2").returncode == 0
    spoil(out / "index.npz", "cut")
    done = mae_scale(*start, "schedule.stop_after_steps=4")
    assert done.returncode == 0, done.stderr
    assert "going on from step 2" in done.stdout
    assert "is what the checkpoints were trained on" in " ".join((done.stdout + done.stderr).split())
    spoil(out / "index.npz", "cut")
    (images / "new.jpg").write_bytes(encoded(photo(), "JPEG"))
    code, _, error = call(*start)
    assert code == 2
    assert f"{out / 'index.npz'} is damaged, and {images} does not give the index" in " ".join(error.split())
    (out / "index.npz").unlink()  # as a message used to advise
    code, _, error = call(*start)
    assert code == 2
    assert f"{out / 'index.npz'} is missing" in " ".join(error.split())
    assert list(losses(out)) == [1, 2, 3, 4]


def test_a_data_folder_gone_between_two_starts_is_said(images, tmp_path, mae_scale, call):
    start = ["pretrain", "demo", "--out", tmp_path / "run", *arguments(images)]
    assert mae_scale(*start, "schedule.stop_after_steps=2").returncode == 0
    images.rename(tmp_path / "elsewhere")
    code, out, error = call(*start)
    said = " ".join((out + error).split())
    assert code == 2, said
    assert f"{images} does not exist" in said
    assert "turned bad" not in said


@pytest.mark.parametrize("how", ["gone", "unmounted"])
def test_a_data_folder_gone_while_a_run_reads_it_is_said_and_no_image_is_blamed(images, tmp_path, how):
    many = [*arguments(images), "schedule.epochs=4000", "checkpoint.every_steps=5", "checkpoint.every_epochs=null"]
    command = [sys.executable, "-m", "mae_scale", "pretrain", "demo", "--out", str(tmp_path / "run"), *many]
    with warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        try:
            deadline = time.monotonic() + 200
            while not list((tmp_path / "run" / "checkpoints").glob("step_*")) and time.monotonic() < deadline:
                time.sleep(0.1)
            shutil.move(images, tmp_path / "elsewhere")
            if how == "unmounted":
                images.mkdir()
            said = " ".join(run.communicate(timeout=120)[0].split())
        finally:
            run.kill()
    assert run.returncode in (1, 2), said
    assert f"the data folder {images} {'does not exist' if how == 'gone' else 'holds nothing'} any more" in said
    assert "bad image" not in said
    assert "turned bad" not in said
