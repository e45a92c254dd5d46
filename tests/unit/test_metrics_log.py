"""metrics.jsonl: every row whole, none twice, whatever the run before it died of."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from data_pipeline.files import write_atomically
from mae_scale.tracking.metrics_log import MetricsLog, read_metrics


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def fill(path, last_step):
    with MetricsLog(path) as log:
        for step in range(1, last_step + 1):
            log.append(step, step / 10, {"train/loss": 1 / step})


def test_row_has_step_epoch_time_and_the_metrics(tmp_path):
    before = time.time()
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append(20, 0.5, {"train/loss": np.float32(0.25), "train/lr": 1e-4, "perf/mfu": 0})
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert before - 1 <= row.pop("time") <= time.time() + 1
    assert row == {"step": 20, "epoch": 0.5, "train/loss": 0.25, "train/lr": 1e-4, "perf/mfu": 0}


def test_row_is_readable_while_the_run_goes_on(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, 0.1, {"train/loss": 1.0})
    assert steps(tmp_path / "metrics.jsonl") == [1]
    log.close()


def test_rows_past_the_checkpoint_are_dropped_and_logged_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, 10)
    with MetricsLog(path, resume_step=6) as log:
        assert steps(path) == [1, 2, 3, 4, 5, 6]
        for step in range(7, 13):
            log.append(step, step / 10, {"train/loss": 0.0})
    assert steps(path) == list(range(1, 13))


def test_new_run_does_not_keep_rows_of_another(tmp_path):
    fill(tmp_path / "metrics.jsonl", 3)
    with MetricsLog(tmp_path / "metrics.jsonl"):
        assert steps(tmp_path / "metrics.jsonl") == []


def test_torn_last_line_is_dropped_and_the_next_row_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, 4)
    path.write_bytes(path.read_bytes()[:-9])
    assert steps(path) == [1, 2, 3]
    with MetricsLog(path, resume_step=10) as log:
        log.append(4, 0.4, {"train/loss": 0.5})
    assert steps(path) == [1, 2, 3, 4]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_damaged_line_costs_itself_only_and_is_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    fill(path, 4)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\0\0\0", *lines[2:]]))
    MetricsLog(path, resume_step=4).close()
    assert steps(path) == [1, 3, 4]
    assert "line 2" in caplog.text


def test_resume_that_drops_nothing_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, 4)
    before = path.stat().st_ino
    MetricsLog(path, resume_step=4).close()
    assert path.stat().st_ino == before


def test_step_that_does_not_go_on_is_refused(tmp_path):
    fill(tmp_path / "metrics.jsonl", 4)
    with MetricsLog(tmp_path / "metrics.jsonl", resume_step=4) as log:
        with pytest.raises(ValueError, match="step 4"):
            log.append(4, 0.4, {})
        log.append(5, 0.5, {})


def test_not_finite_is_valid_json_and_comes_back_as_it_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(1, 0.1, {"a": float("nan"), "b": float("inf"), "c": -np.float32("inf")})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (row,) = read_metrics(path)
    assert np.isnan(row["a"])
    assert (row["b"], row["c"]) == (float("inf"), float("-inf"))


def test_killed_run_leaves_only_whole_rows_that_the_next_one_keeps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = textwrap.dedent(f"""
        from mae_scale.tracking.metrics_log import MetricsLog
        log = MetricsLog({str(path)!r})
        for step in range(1, 10**9):
            log.append(step, step / 10, {{"train/loss": 0.1}})
    """)
    process = subprocess.Popen([sys.executable, "-c", program])
    end = time.monotonic() + 30
    while len(read_metrics(path)) < 200:
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    rows = len(path.read_text().splitlines())
    MetricsLog(path, resume_step=10**9).close()
    assert steps(path) == list(range(1, rows + 1))


def test_writing_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
