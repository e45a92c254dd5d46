"""`mae-scale data pack`: the same shards from any number of processes, cut off or damaged; what it refuses."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from data_pipeline.samples import write_photos
from tests.pictures import picture, put


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "photos", 60)


@pytest.fixture(scope="module")
def packed(tmp_path_factory, photos, mae_scale) -> Path:
    """The photos in shards of 1 MiB, from one process."""
    target = tmp_path_factory.mktemp("packed") / "shards"
    done = mae_scale("data", "pack", photos, target, "--shard-mib", 1, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("60 images, ")
    return target


def test_any_number_of_processes_writes_the_same_shards(photos, packed, tmp_path, mae_scale):
    done = mae_scale("data", "pack", photos, tmp_path / "three", "--shard-mib", 1, "--workers", 3)
    assert done.returncode == 0, done.stderr
    assert len(shards(packed)) > 2
    assert shards(tmp_path / "three") == shards(packed)
    assert (tmp_path / "three" / "pack.json").read_bytes() == (packed / "pack.json").read_bytes()
    assert {path.name for path in packed.iterdir()} == {*shards(packed), "pack.json", ".mae_scale_index.npz"}


def test_bytes_are_unchanged_and_members_tell_nothing_of_time_and_user(photos, packed):
    found = {}
    for name in shards(packed):
        with tarfile.open(packed / name) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
                found[member.name] = archive.extractfile(member).read()
    assert found == {path.name: path.read_bytes() for path in sorted(photos.glob("*.jpg"))}


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def session_of(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, *_, session = (folder / "stat").read_text().rpartition(") ")[2].split()[:4]
        except OSError:
            continue
        if int(session) == pid and state != "Z":
            found.append(int(folder.name))
    return found


def test_killed_in_the_middle_and_started_again_it_equals_the_uninterrupted(photos, tmp_path, call, mae_scale):
    many = tmp_path / "many"  # of many shards: some are still to come, however late this process sees the first
    for number in range(6):
        shutil.copytree(photos, many / str(number), copy_function=os.link, ignore=shutil.ignore_patterns(".*"))
    options = ["--shard-mib", 1, "--shorter-side", 360]
    assert mae_scale("data", "pack", many, tmp_path / "whole", *options, "--workers", 1).returncode == 0
    target = tmp_path / "killed"
    command = [sys.executable, "-m", "mae_scale", "data", "pack", many, target, *options, "--workers", 2]
    process = subprocess.Popen([*map(str, command)], start_new_session=True, stderr=subprocess.PIPE)
    wait_until(lambda: list(target.glob(".*.tar.json")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not session_of(process.pid))  # its workers end, too
    process.stderr.close()
    names = [record.name[1:-5] for record in target.glob(".*.tar.json")]
    before = {name: (target / name).stat().st_mtime_ns for name in names}
    assert 0 < len(before) < len(shards(tmp_path / "whole"))
    assert not (target / "pack.json").exists()
    code, _, error = call("data", "index", target)
    assert code == 2
    assert "are not complete; run the same `mae-scale data pack` again" in error
    refused = call("data", "pack", many, target, "--shard-mib", 2, "--shorter-side", 360)
    assert refused[0] == 2
    assert "other options (shard_mib 1 -> 2)" in refused[2]
    done = mae_scale("data", "pack", many, target, *options)
    assert done.returncode == 0, done.stderr
    assert shards(target) == shards(tmp_path / "whole")
    assert {name: (target / name).stat().st_mtime_ns for name in before} == before  # kept
    assert {path.name for path in target.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_a_shard_that_was_damaged_while_packing_was_cut_off_is_written_anew(photos, packed, tmp_path, call):
    target = tmp_path / "cut"
    shutil.copytree(packed, target)
    manifest = json.loads((target / "pack.json").read_text())
    (target / "pack.json").rename(target / "pack.json.unfinished")
    for record in manifest["shards"]:
        (target / f".{record['name']}.json").write_text(json.dumps(record))
    flip(target / "000001.tar", 70_000)
    (target / ".000002.tar.4242.tmp").write_bytes(b"a part")
    (target / ".000000.tar.json").write_bytes(b'{"format"')
    assert call("data", "pack", photos, target, "--shard-mib", 1, "--workers", 1)[0] == 0
    assert shards(target) == shards(packed)
    assert {path.name for path in target.iterdir()} == {path.name for path in packed.iterdir()}


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def test_verify_names_the_shard_with_a_flipped_byte_and_pack_mends_it(photos, packed, tmp_path, call):
    target = tmp_path / "shards"
    shutil.copytree(packed, target)
    code, out, _ = call("data", "verify", target)
    assert (code, out) == (0, "60 images, 0 bad (headers and ends only; --deep decodes), every shard has its digest\n")
    index = (target / ".mae_scale_index.npz").read_bytes()
    flip(target / "000001.tar", 70_000)
    os.truncate(target / "000002.tar", 5000)
    put(target, "000009.tar", b"")
    code, out, _ = call("data", "verify", target)
    assert code == 1
    assert out.splitlines()[0] == "000001.tar: its bytes have changed since it was packed (sha256)"
    assert out.splitlines()[1].startswith("000002.tar: 5000 bytes, ")
    assert out.splitlines()[2] == "000009.tar: not in pack.json"
    assert (target / ".mae_scale_index.npz").read_bytes() == index
    (target / "000009.tar").unlink()
    (target / "000000.tar").unlink()
    assert call("data", "verify", target)[1].startswith("000000.tar: No such file")
    assert call("data", "pack", photos, target, "--shard-mib", 1, "--workers", 1)[0] == 0
    assert shards(target) == shards(packed)
    assert call("data", "verify", target)[0] == 0


def refusals(tmp_path: Path, photos: Path, packed: Path) -> dict[str, tuple[list, str]]:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    put(tmp_path / "full", "mine.txt", b"mine")
    put(tmp_path / "few", "a.jpg", picture())
    put(tmp_path / "damaged", "pack.json", b"{")
    put(tmp_path / "bad", "a.jpg", b"text")
    new = tmp_path / "new"
    return {
        "missing": ([tmp_path / "missing", new], "does not exist"),
        "empty": ([tmp_path / "empty", new], "no image in"),
        "nothing readable": ([tmp_path / "bad", new], "no readable image in"),
        "inside": ([photos, photos / "shards"], "inside the images' folder"),
        "itself": ([photos, photos], "inside the images' folder"),
        "a file": ([photos, tmp_path / "file"], "is not a folder"),
        "below a file": ([photos, tmp_path / "file" / "below"], "cannot be written to: Not a directory"),
        "something else there": ([photos, tmp_path / "full"], "is not empty and holds no packed shards"),
        "damaged manifest": ([photos, tmp_path / "damaged"], "is damaged or not a manifest"),
        "other images": ([tmp_path / "few", packed, "--shard-mib", 1], "holds shards of other images (60 of index"),
        "other options": ([photos, packed], "packed with other options (shard_mib 1 -> 256)"),
        "quality alone": ([photos, new, "--quality", 80], "--quality re-encodes nothing without --shorter-side"),
    }


CASES = ["missing", "empty", "nothing readable", "inside", "itself", "a file", "below a file", "something else there"]
CASES += ["damaged manifest", "other images", "other options", "quality alone"]


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_packed_is_one_clear_line_and_nothing_is_lost(case, tmp_path, photos, packed, call):
    words, message = refusals(tmp_path, photos, packed)[case]
    before = shards(packed)
    code, _, error = call("data", "pack", *words)
    assert code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert shards(packed) == before
    assert not (tmp_path / "new").exists()


def test_two_at_a_time_are_refused(photos, packed, call):
    folder = os.open(packed, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    code, _, error = call("data", "pack", photos, packed, "--shard-mib", 1)
    os.close(folder)
    assert code == 2
    assert "another process is packing into" in error


def test_a_disk_without_room_is_one_clear_line_and_whole_shards_are_kept(photos, packed, tmp_path):
    """A limit on the size of a file, as a full disk fails: the write itself raises OSError."""
    options = ["--shard-mib", "1", "--workers", "1"]
    command = [sys.executable, "-m", "mae_scale", "data", "pack", photos, tmp_path / "shards", *options]
    largest = max(len(data) for data in list(shards(packed).values())[1:])
    small = len(shards(packed)["000000.tar"])
    assert small < largest
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (small, small)),
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "cannot write" in done.stderr
    assert "make room and run the same command again, whole shards are kept" in done.stderr
    kept = shards(tmp_path / "shards")
    assert 0 < len(kept) < len(shards(packed))
    assert not list((tmp_path / "shards").glob(".*.tmp"))
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "shards") == shards(packed)
