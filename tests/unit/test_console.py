"""What rank 0 shows: plain lines in a log, a bar on a terminal, the time left from the recent rate."""

import io
import logging
import re

import pytest

from mae_scale.human_units import duration
from mae_scale.tracking.console import Console, NullConsole

METRICS = {"train/loss": 0.71234, "train/lr": 1.5e-4, "perf/images_per_second": 4096.4}


class Clock:
    """Time that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def plain(**options):
    stream = io.StringIO()
    clock = Clock()
    return Console(100_000, steps_per_epoch=1000, stream=stream, clock=clock, **options), stream, clock


def test_log_file_gets_one_plain_line_a_step_with_everything_in_fixed_columns():
    console, stream, clock = plain(label="pretrain")
    with console:
        for step in (20, 40_020, 100_000):
            clock.now += 20
            console.update(step, METRICS)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert re.search(r"[^ -~\n]", stream.getvalue()) is None
    for word in (
        "pretrain  40020/100000",
        "epoch    40.02",
        "loss   0.7123",
        "lr  1.50e-04",
        "4096.4 images/s",
    ):
        assert word in lines[1]
    for word in ("/100000", "epoch", "loss", "lr", "images/s", "left"):
        assert len({line.index(word) for line in lines}) == 1


def test_line_is_there_at_once():
    console, stream, _ = plain()
    with console:
        console.update(20, METRICS)
        assert stream.getvalue().count("\n") == 1


def test_time_left_is_from_the_recent_rate_not_from_the_start():
    console, _, clock = plain()
    assert console.time_left_s() is None
    for step in range(1, 101):
        clock.now += 100.0
        console.update(step, METRICS)
    for step in range(101, 201):
        clock.now += 2.0
        console.update(step, METRICS)
    assert console.time_left_s() == pytest.approx(2.0 * (100_000 - 200))


def test_time_left_after_a_resume_does_not_count_the_steps_before():
    console, _, clock = plain(first_step=50_000)
    clock.now += 10.0
    console.update(50_010, METRICS)
    assert console.time_left_s() == pytest.approx(49_990)


def test_metric_that_is_missing_is_no_error():
    for live in (True, False):
        with Console(10, stream=Terminal(), live=live) as console:
            console.update(1, {})


def test_bar_fits_its_terminal_and_shows_loss_rate_and_time_left(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    stream, clock = Terminal(), Clock()
    with Console(400_000, steps_per_epoch=1000, stream=stream, clock=clock, label="pretrain") as console:
        clock.now = 5.0
        console.update(1000, METRICS)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    last = text.strip().splitlines()[-1]
    assert len(last) <= 100
    for word in ("1000/400000", "epoch 1.0", "loss 0.7123", "4096 images/s", "00:33:15 left"):
        assert word in last


@pytest.mark.parametrize("live", [True, False])
def test_messages_and_logged_warnings_are_lines_of_their_own(live, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    with Console(10, stream=stream, live=live) as console:
        console.update(1, METRICS)
        console.message("written [step_00000001] to /a/[b]")
        console.warning("bad image")
        logging.getLogger("mae_scale.tracking.test").warning("server %s is down", "x")
        logging.getLogger("data_pipeline.test").info("index read")
        console.update(2, METRICS)
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()))
    for line in (
        "written [step_00000001] to /a/[b]",
        "warning: bad image",
        "warning: server x is down",
        "index read",
    ):
        assert [text.strip() for text in lines].count(line) == 1


def test_loggers_are_as_before_afterwards():
    logger = logging.getLogger("mae_scale")
    before = (list(logger.handlers), logger.level, logger.propagate)
    with pytest.raises(RuntimeError), Console(10, stream=io.StringIO()):
        raise RuntimeError
    assert (list(logger.handlers), logger.level, logger.propagate) == before


def test_other_ranks_are_silent(capfd):
    with NullConsole() as console:
        console.update(1, METRICS)
        console.message("text")
        console.warning("text")
    assert capfd.readouterr() == ("", "")


def test_duration_is_readable():
    assert duration(None) == "--:--:--"
    assert duration(59.2) == "00:01:00"
    assert duration(90_061) == "1d 01:01:01"
