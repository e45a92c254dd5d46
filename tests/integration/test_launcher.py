"""The launcher of local ranks: what it passes on, what it returns, and that nothing outlives it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.errors import RunError
from mae_scale.launch import local
from mae_scale.launch.local import launch_local_ranks
from tests.signals import wait_until_taken

RANK = "import os, signal, sys, time; from pathlib import Path; rank = int(os.environ['RANK']); "
LISTEN = "from mae_scale.distributed import stop_requests; stop_requests.listen(); stop_requests.heed('saving'); "
BOTH_UP = "(Path(sys.argv[1]) / f'up{rank}').touch(); "

WAIT_FOR_A_REQUEST = f"""
{RANK}
{BOTH_UP}
time.sleep(0.5)  # a request that comes now, before listen(), must not be lost either
{LISTEN}
while not stop_requests.requested():
    time.sleep(0.02)
time.sleep(0.5 * (1 + rank))
(Path(sys.argv[1]) / f"saved{{rank}}").write_text(stop_requests.requested())
sys.exit(75)
"""
AS_A_PROCESS = """
import signal, sys
from mae_scale.distributed import stop_requests
from mae_scale.launch.local import launch_local_ranks
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has put in the background
stop_requests.listen()
try:
    sys.exit(launch_local_ranks(2, [sys.argv[1]], program=("-c", sys.argv[2])))
except KeyboardInterrupt:
    sys.exit(130)
"""


def ranks_do(*codes: str) -> tuple[str, str]:
    """A program whose rank r runs codes[r]."""
    return "-c", RANK + f"exec({codes!r}[rank])"


@pytest.fixture
def nothing_left(tmp_path):
    """After the test no process is left that was started with its folder as an argument."""
    yield
    deadline = time.monotonic() + 5
    while (left := of_this_test(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        process.kill()
    assert not left


def of_this_test(folder: Path) -> list[psutil.Process]:
    processes = psutil.process_iter(["cmdline", "status"])
    return [p for p in processes if str(folder) in (p.info["cmdline"] or []) and p.info["status"] != "zombie"]


def start(folder: Path, code: str, **options) -> subprocess.Popen:
    """The launcher as a process of its own, with two ranks that are up."""
    process = subprocess.Popen([sys.executable, "-c", AS_A_PROCESS, str(folder), code], **options)
    deadline = time.monotonic() + 20
    while not all((folder / f"up{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((0, 75), 75), ((75, 75), 75), ((3, 0), 3), ((75, 4), 4)],
)
def test_the_exit_code_is_that_of_all_ranks_together(codes, expected, tmp_path, nothing_left):
    program = ranks_do(*(f"sys.exit({code})" for code in codes))
    assert launch_local_ranks(2, [str(tmp_path)], program) == expected


def test_the_first_failure_counts_and_the_others_have_a_moment_to_end(tmp_path, nothing_left):
    late = "time.sleep(0.5); (Path(sys.argv[1]) / 'said').touch(); sys.exit(6)"
    program = ranks_do("sys.exit(5)", late)
    assert launch_local_ranks(2, [str(tmp_path)], program) == 5
    assert (tmp_path / "said").exists()


@pytest.mark.parametrize("hanging", ["time.sleep(600)", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_a_rank_that_hangs_or_is_stopped_is_ended_after_another_failed(hanging, tmp_path, nothing_left, monkeypatch):
    monkeypatch.setattr(local, "GRACE_S", 0.5)
    assert launch_local_ranks(2, [str(tmp_path)], ranks_do("sys.exit(3)", hanging)) == 3


def test_a_killed_rank_is_named_even_when_another_failed_because_of_it(tmp_path, nothing_left):
    program = ranks_do("sys.exit(1)", "time.sleep(0.4); os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RunError, match=r"^rank 1 was killed by SIGKILL \(out of memory\?\); the same command goes on"):
        launch_local_ranks(2, [str(tmp_path)], program)
    with pytest.raises(RunError, match=r"^rank 0 was killed by SIGSEGV; the same command goes on"):
        launch_local_ranks(2, [str(tmp_path)], ranks_do("os.kill(os.getpid(), signal.SIGSEGV)", "sys.exit(1)"))


def test_an_abort_that_follows_a_failure_does_not_hide_it(tmp_path, nothing_left):
    program = ranks_do("sys.exit(2)", "time.sleep(0.4); os.kill(os.getpid(), signal.SIGABRT)")
    assert launch_local_ranks(2, [str(tmp_path)], program) == 2


def test_ranks_are_told_who_they_are(tmp_path, nothing_left, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("RANK", "9")
    write = "import json; (Path(sys.argv[1]) / f'{rank}.json').write_text(json.dumps(dict(os.environ)))"
    assert launch_local_ranks(2, [str(tmp_path)], ranks_do(write, write)) == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"], e["LOCAL_WORLD_SIZE"]) for e in (first, second)] == [
        ("0", "0", "2", "2"),
        ("1", "1", "2", "2"),
    ]
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert int(first["OMP_NUM_THREADS"]) >= 1
    assert first["GLOO_SOCKET_IFNAME"] == "eth7"  # a default gives way to what the user has set


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_reaches_every_rank_however_early_and_has_no_deadline(signum, tmp_path, nothing_left):
    process = start(tmp_path, WAIT_FOR_A_REQUEST)
    process.send_signal(signum)
    assert process.wait(20) == 75
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == [signum.name] * 2


def test_a_request_to_one_rank_reaches_the_others_when_that_one_has_ended(tmp_path, nothing_left):
    listening = LISTEN.replace("stop_requests.heed('saving'); ", "") + "time.sleep(600)"  # it ends at once
    assert launch_local_ranks(2, [str(tmp_path)], ranks_do("sys.exit(75)", listening)) == 75


def test_a_rank_that_a_second_request_finds_no_longer_listening_has_stopped_as_asked(tmp_path, nothing_left):
    deaf = RANK + LISTEN + "signal.signal(signal.SIGTERM, signal.SIG_DFL); " + BOTH_UP + "time.sleep(600)"
    process = start(tmp_path, deaf)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75


def test_a_request_noted_before_the_start_starts_no_rank(tmp_path, nothing_left, monkeypatch):
    monkeypatch.setattr(local, "requested", lambda: "SIGTERM")
    assert launch_local_ranks(2, [str(tmp_path)], ranks_do(BOTH_UP, BOTH_UP)) == 75
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_is_one_request_to_every_rank_and_one_line(whole_group, tmp_path, nothing_left):
    process = start(tmp_path, WAIT_FOR_A_REQUEST, stderr=subprocess.PIPE, text=True, start_new_session=True)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 75
    assert said == "SIGINT: saving; Ctrl-C again ends at once\n"
    assert len(list(tmp_path.glob("saved*"))) == 2


@pytest.mark.parametrize("whole_group", [True, False])
def test_a_second_ctrl_c_kills_every_rank(whole_group, tmp_path, nothing_left):
    never = RANK + LISTEN + BOTH_UP + "time.sleep(600)"
    process = start(tmp_path, never, start_new_session=True)
    for _ in range(2):
        if whole_group:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        wait_until_taken(process.pid, signal.SIGINT)
    assert process.wait(20) == 130


def test_a_launcher_killed_outright_leaves_ranks_that_save_and_end(tmp_path, nothing_left):
    process = start(tmp_path, WAIT_FOR_A_REQUEST)
    time.sleep(1)  # they listen by now; test_stop_requests has the other case
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while len(list(tmp_path.glob("saved*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
