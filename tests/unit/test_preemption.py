"""Requests to stop are noted, never lost, and do not kill."""

import os
import signal
import subprocess
import sys

import pytest

HEAD = "import os, signal, sys; from mae_scale.training import preemption; "


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_noted_by_name_and_the_first_one_counts(name):
    listen = "preemption.listen(); print(preemption.requested()); "
    send = f"[os.kill(os.getpid(), s) for s in (signal.{name}, signal.SIGUSR1, signal.SIGTERM)]; "
    assert run(listen + send + "print(preemption.requested())").split() == ["None", name]


def test_a_signal_that_came_before_is_noted_when_it_was_blocked():
    early = "signal.pthread_sigmask(signal.SIG_BLOCK, preemption.SIGNALS); os.kill(os.getpid(), signal.SIGTERM); "
    assert run(early + "preemption.listen(); print(preemption.requested())") == "SIGTERM"


def test_a_launcher_that_was_already_dead_is_a_request_and_a_living_one_is_not():
    report = "preemption.listen(); print(preemption.requested(), preemption.LAUNCHER_VARIABLE in os.environ)"
    assert run(report, MAE_SCALE_LAUNCHER_PID="1") == "SIGTERM False"
    assert run(report, MAE_SCALE_LAUNCHER_PID=str(os.getpid())) == "None False"


def test_listening_needs_nothing_heavy():
    assert run("print(sorted({'torch', 'numpy', 'deepspeed', 'nvidia'} & sys.modules.keys()))") == "[]"


def test_handlers_are_not_installed_by_the_import():
    code = subprocess.run([sys.executable, "-c", HEAD + "os.kill(os.getpid(), signal.SIGTERM)"]).returncode
    assert code == -signal.SIGTERM
