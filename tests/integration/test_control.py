"""Ranks agree on requests, and those that are left name the one that is lost."""

import os
import re
import subprocess
import sys

import psutil
import pytest
import torch

from data_pipeline.errors import RunError
from mae_scale.distributed.heartbeat import Control
from mae_scale.distributed.ranks import Ranks
from tests import warm

TIMEOUT_S = 2.0
LAUNCHER = """
import os, sys
from data_pipeline.errors import RunError
from mae_scale.launch import local
local.GRACE_S = 3.0  # timeouts are shorter here, too
try:
    code = local.launch_local_ranks(int(sys.argv[1]), sys.argv[2:], program=("-c", os.environ["WORKER"]))
except RunError as error:
    sys.exit(f"launcher: {error}")
sys.exit(code)
"""
WORKER = """
import os, signal, sys, time, traceback
from mae_scale.distributed import stop_requests
stop_requests.listen()
import torch
from data_pipeline.errors import RunError
from mae_scale.distributed.heartbeat import Control
from mae_scale.distributed.collectives import process_group
from mae_scale.distributed.ranks import leave, ranks_from_environment
ranks = ranks_from_environment()
rank = ranks.rank
try:
    timeout_s = float(sys.argv[2])
    with process_group(ranks, timeout_s), Control(ranks, timeout_s) as control:
        control.agree(False)
        control.meet()  # else a rank might stop before another has joined the group
        started = time.monotonic()
        exec(sys.argv[1])
except RunError as error:
    sys.stderr.write(f"rank {rank} after {time.monotonic() - started:.1f} s: {error}\\n")
    leave(1)
except Exception:
    traceback.print_exc()
    leave(1)
"""


def run(world_size: int, code: str, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess:
    """Ranks that run `code` inside Control, under the launcher; fails when one outlives it."""
    done = warm.run(
        [sys.executable, "-c", LAUNCHER, str(world_size), code, str(timeout_s)],
        env={**os.environ, "WORKER": WORKER, "OMP_NUM_THREADS": "1"},
        timeout=60,
    )
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if code in (p.info["cmdline"] or [])]
    return done


def said(done: subprocess.CompletedProcess) -> dict[int, tuple[float, str]]:
    """What each rank said at last, and how many seconds after the loss."""
    lines = re.findall(r"^rank (\d+) after ([\d.]+) s: (.*)$", done.stderr, re.M)
    return {int(rank): (float(seconds), line) for rank, seconds, line in lines}


def line(rank: int, timeout_s: float = TIMEOUT_S) -> str:
    return (
        f"rank {rank} no longer answers (ended, killed, or hanging for more than {timeout_s:g} s); "
        f"the same command goes on from the last checkpoint"
    )


def test_what_one_rank_asks_for_is_true_on_all_and_a_programming_error_keeps_its_traceback():
    done = run(
        2,
        "assert control.agree(rank == 1, False, rank == 0, True) == [False], 'the answer to what was asked before'\n"
        "assert control.agree(False, False) == [True, False, True, True], 'the answer comes a step later'\n"
        "assert control.agree(rank == 1, True) == [False, False], 'nothing is kept from one step to the next'\n"
        "control.meet()\n"
        "assert control.agree(False, False) == [True, True], 'an answer that was waited for is still there'\n"
        "control.agree(True)\n"
        "control.forget()\n"
        "assert control.agree(False, False) == [False, False], 'what was dealt with is not answered'\n"
        "assert control.silent_ranks() == [], 'all hearts beat'\n"
        "control.agree(False)\n"
        "began = time.monotonic()\n"
        "for _ in range(200): control.agree(False)\n"
        "assert (time.monotonic() - began) / 200 < 0.02, 'no cost beside a step'\n"
        "raise RuntimeError('shapes do not fit')\n",
    )
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: shapes do not fit") == 2
    assert "AssertionError" not in done.stderr
    assert "terminate called" not in done.stderr


@pytest.mark.parametrize(("world_size", "lost"), [(2, 0), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_by_all_others_and_ended(world_size, lost):
    done = run(world_size, f"os.kill(os.getpid(), signal.SIGSTOP) if rank == {lost} else control.agree(False)")
    assert done.returncode == 1, done.stderr
    others = set(range(world_size)) - {lost}
    assert {rank: text for rank, (_, text) in said(done).items()} == dict.fromkeys(others, line(lost)), done.stderr
    assert max(seconds for seconds, _ in said(done).values()) < TIMEOUT_S + 6
    assert done.stderr.count("\n") == len(others), done.stderr


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_is_named_before_the_timeout_by_the_other_and_by_the_launcher(lost):
    timeout_s = 6.0
    done = run(2, f"os.kill(os.getpid(), signal.SIGKILL) if rank == {lost} else control.agree(False)", timeout_s)
    ((seconds, text),) = said(done).values()
    assert text == line(lost, timeout_s)
    assert seconds < timeout_s
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"launcher: rank {lost} was killed by SIGKILL (out of memory?)")
    assert done.stderr.count("\n") == 2, done.stderr


def test_a_rank_that_ends_with_its_own_error_is_named_also_by_one_that_notices_later():
    """Rank 0 hosts the store, and stays until rank 2 has read it."""
    timeout_s = 4.0
    done = run(
        3,
        "if rank == 1:\n"
        "    raise RunError('no space left')\n"
        "time.sleep(1.2 if rank == 2 else 0)\n"
        "torch.distributed.all_reduce(torch.ones(1))",
        timeout_s,
    )
    texts = {rank: text for rank, (_, text) in said(done).items()}
    assert texts == {0: line(1, timeout_s), 1: "no space left", 2: line(1, timeout_s)}, done.stderr
    assert done.returncode == 1


ORDINARY = [
    ValueError("connection closed"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied; timed out"),
    RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 12 vs 8"),
    torch.distributed.DistBackendError("NCCL error in: NCCLUtils.cpp:77, invalid usage"),
    KeyboardInterrupt(),
    RunError("the loss is nan"),
]


@pytest.mark.parametrize("error", ORDINARY, ids=lambda error: type(error).__name__)
def test_an_error_that_no_lost_rank_caused_is_not_explained_away(error):
    assert Control(Ranks(0, 1, 0), 1.0).explained(error) is None


LOST = [
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:4: reset by peer"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4"),
    RuntimeError("[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete"),
    torch.distributed.DistStoreError("wait timeout after 2000ms, keys: /nokey"),
    torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_a_lost_peer_without_a_silent_rank_is_one_clear_line(error, monkeypatch):
    monkeypatch.setattr(Control, "silent_ranks", lambda self: [])
    explanation = Control(Ranks(0, 2, 0), 1.0).explained(error)
    assert isinstance(explanation, RunError)
    assert str(explanation).startswith("the ranks lost touch with each other: ")
    assert ".cc:" not in str(explanation)
    assert str(explanation).endswith("the same command goes on from the last checkpoint")


def test_a_rank_that_does_not_come_is_named_before_the_device_is_waited_for():
    done = run(
        2, "time.sleep(60) if rank == 1 else (control.agree(False), control.meet(), time.sleep(20))", timeout_s=3
    )
    assert done.returncode == 1
    assert re.search(r"rank 0 after \d\.\d s: ", done.stderr)
