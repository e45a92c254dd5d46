"""A request to stop ends a process at once, or is noted where that is asked for; it is never lost."""

import os
import signal
import subprocess
import sys

import pytest

from tests.signals import wait_until_taken

HEAD = """
import ctypes, os, signal, sys, time
from mae_scale.distributed import stop_requests
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has put in the background
def send(*signals):
    for signum in signals:
        os.kill(os.getpid(), signum)
        time.sleep(0.2)
"""
LISTEN = "stop_requests.listen()\n"
HEED = LISTEN + "stop_requests.heed('saving')\n"
BLOCKED = """
mutex = ctypes.create_string_buffer(64)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
print("up", flush=True)
ctypes.CDLL(None).pthread_mutex_lock(mutex)  # for ever, as in a library: Python's own handlers wait
"""
AT_ONCE = "; there was nothing to save, and the same command begins again or goes on"


def start(code: str, **environment: str) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "LOCAL_", "WORLD_"))}
    command = [sys.executable, "-c", HEAD + code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**clean, **environment}, **pipes)


def run(code: str, **environment: str) -> tuple[int, str, str]:
    process = start(code, **environment)
    out, error = process.communicate(timeout=30)
    return process.returncode, out.strip(), error


def run_blocked(code: str, *signals: signal.Signals, **environment: str) -> tuple[int, str]:
    process = start(code + BLOCKED, **environment)
    process.stdout.readline()
    for signum in signals:
        process.send_signal(signum)
        wait_until_taken(process.pid, signum)
    _, error = process.communicate(timeout=30)
    return process.returncode, error


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_request_ends_at_once_what_has_nothing_to_save_whatever_it_is_doing(name):
    signum = signal.Signals[name]
    assert run_blocked(LISTEN, signum) == (75, f"stopped by {name}{AT_ONCE}\n")
    assert run_blocked(LISTEN, signum, RANK="1") == (75, "")  # the first rank speaks


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_request_is_noted_by_name_where_it_is_heeded_and_the_first_one_counts(name):
    code = f"send(signal.{name}, signal.SIGUSR1, signal.SIGTERM)\nprint(stop_requests.requested())"
    again = "; Ctrl-C again ends at once" if name == "SIGINT" else ""
    assert run(HEED + "print(stop_requests.requested())\n" + code) == (0, f"None\n{name}", f"{name}: saving{again}\n")


def test_a_second_ctrl_c_ends_at_once_whatever_the_process_is_doing():
    code, said = run_blocked(HEED, signal.SIGINT, signal.SIGINT)
    assert code == 130
    first, second = said.splitlines()
    assert first == "SIGINT: saving; Ctrl-C again ends at once"
    assert second.startswith("interrupted; nothing is half-written")


def test_a_ctrl_c_that_a_launcher_hands_on_is_the_same_one_and_a_later_one_another():
    twice = "stop_requests.HANDED_ON_S = 2\nsend(signal.SIGINT, signal.SIGINT)\n"
    assert run(HEED + twice, RANK="1")[0] == 0
    assert run(HEED + twice + "time.sleep(stop_requests.HANDED_ON_S)\n" + twice, RANK="1")[0] == 130
    # The local launcher ends its ranks itself.
    many = twice + "time.sleep(stop_requests.HANDED_ON_S)\n" + twice
    assert run(HEED + many, RANK="1", MAE_SCALE_LAUNCHER_PID=str(os.getpid()))[0] == 0


def test_a_request_that_ends_a_process_gives_back_the_lock_that_it_holds(tmp_path):
    hold = "from pathlib import Path\nfrom mae_scale.training.run_lock import hold\n"
    hold += f"with hold(Path({str(tmp_path)!r})):\n    print(*os.listdir({str(tmp_path)!r}))\n    send(signal.SIGTERM)"
    assert run(LISTEN + hold) == (75, "run.lock", f"stopped by SIGTERM{AT_ONCE}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_passes_requests_on_notes_a_second_ctrl_c_and_ends_nothing_itself():
    block = "with stop_requests.passing_on():\n    send(signal.SIGINT)\n    print(stop_requests.insisted())\n"
    assert run(LISTEN + block + "    send(signal.SIGINT)\n    print(stop_requests.insisted())") == (
        0,
        "False\nTrue",
        "",
    )
    assert run(LISTEN + block + "send(signal.SIGTERM)")[0] == 75


def test_ctrl_c_stays_ignored_where_it_was():
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    assert run(ignored + LISTEN + "send(signal.SIGINT)") == (0, "", "")


def test_a_signal_that_came_before_is_taken_when_it_was_blocked():
    early = "signal.pthread_sigmask(signal.SIG_BLOCK, stop_requests.SIGNALS)\nos.kill(os.getpid(), signal.SIGTERM)\n"
    assert run(early + LISTEN + "time.sleep(10)") == (75, "", f"stopped by SIGTERM{AT_ONCE}\n")


def test_a_launcher_that_was_already_dead_is_a_request_and_a_living_one_is_not():
    report = HEED + "time.sleep(0.2)\nprint(stop_requests.requested(), stop_requests.LAUNCHER_VARIABLE in os.environ)"
    assert run(LISTEN + "time.sleep(10)", MAE_SCALE_LAUNCHER_PID="1")[0] == 75
    assert run(report, MAE_SCALE_LAUNCHER_PID=str(os.getpid()))[1] == "None False"


def test_listening_needs_nothing_heavy():
    assert run("print(sorted({'torch', 'numpy', 'deepspeed', 'nvidia'} & sys.modules.keys()))")[1] == "[]"


def test_handlers_are_not_installed_by_the_import():
    assert run("os.kill(os.getpid(), signal.SIGTERM)")[0] == -signal.SIGTERM
