"""What a user sees of a training: a terminal of any width, --quiet, --log-file, and how each start was closed."""

import re

import pytest

from tests.screen import Screen, in_terminal
from tests.tiny import arguments, events


@pytest.mark.parametrize(
    ("columns", "ranks", "line"),
    [
        (40, 2, r"step 4/7  loss   \d\.\d{4}"),
        (60, 1, r"step 4/7  loss   \d\.\d{4}  lr  \d\.\d\de-04  +\d+\.\d images/s"),
    ],
)
def test_lines_scroll_by_above_a_bar_that_is_gone_at_the_end(tmp_path, digits, columns, ranks, line):
    """Fitted to the width: step and loss are what stays, and nothing wraps."""
    command = ["pretrain", "demo", "--nproc", ranks, "--out", "run", "--tracking-uri", "off"]
    more = ["tracking.log_every_steps=2", "schedule.stop_after_steps=7"]
    code, screen, states = in_terminal([*command, *arguments(digits, *more)], columns, cwd=tmp_path)
    assert code == 0, screen.lines
    steps = [text for text in screen.lines if text.startswith("step ")]
    assert [text[5:8] for text in steps] == ["1/7", "2/7", "4/7", "6/7", "7/7"]
    assert re.fullmatch(line, steps[2])
    assert not [text for text in screen.wrapped if text.startswith("step") or "━" in text]
    # The bar, below everything else as long as it runs; its step and loss are those of the line above it.
    bars = {lines[-2]: lines[-1] for lines in states if "━" in lines[-1] and lines[-2:][0].startswith("step ")}
    assert bars  # seen for some of the steps: what is printed at one moment may be read together
    assert all(f" {above[:8]}  loss {above[17:23]}" in bar and len(bar) == columns for above, bar in bars.items())
    assert not [text for text in screen.lines if "━" in text]
    whole = "".join(screen.lines)
    assert whole.index("done: stopped early, checkpoints in run/checkpoints") > whole.index("step 7/7")


def test_the_screen_of_these_tests_wraps_and_erases():
    screen = Screen(4)
    screen.feed("abcdef\r\nbar\r\x1b[2K\x1b[1A\x1b[2Kend")
    assert (screen.lines, screen.wrapped) == (["abcd", "end", ""], ["abcd"])


def test_quiet_says_the_last_line_and_the_log_file_has_all_of_every_start(tmp_path, digits, mae_scale):
    out, log = tmp_path / "run", tmp_path / "log.txt"
    command = ["pretrain", "demo", "--out", out, "--tracking-uri", "off", "--log-file", log]
    loud = mae_scale(*command, *arguments(digits, "schedule.stop_after_steps=3"))
    assert (loud.returncode, log.read_text()) == (0, loud.stdout), loud.stderr
    quiet = mae_scale(*command, "--nproc", 2, "--quiet", *arguments(digits, "schedule.stop_after_steps=2"))
    nothing = "nothing to do: step 3 is done already, and schedule.stop_after_steps=2"
    assert quiet.returncode == 0
    assert quiet.stdout.startswith(nothing)
    assert quiet.stdout.count("\n") == 1
    assert quiet.stderr == ""
    refused = mae_scale(*command, "--quiet", *arguments(digits, "seed=1"))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1
    first, second = log.read_text().split("3 steps are done")
    assert first.startswith(loud.stdout)
    assert [*second.splitlines()[-2:]] == [quiet.stdout.strip(), refused.stderr.strip()]
    assert "\x1b" not in log.read_text()
    assert events(out) == [
        ("start", 0, None),
        ("end", 3, "stopped early"),
        ("start", 3, None),
        ("end", 3, "nothing to do"),
    ]


def test_a_log_file_that_cannot_be_written_is_refused_before_anything_is_done(tmp_path, digits, call):
    for place in (tmp_path / "missing" / "log.txt", tmp_path):
        code, _, error = call("pretrain", "demo", "--out", tmp_path / "r", "--log-file", place, *arguments(digits))
        assert code == 2
        assert error.startswith(f"error: --log-file {place}")
    assert not (tmp_path / "r").exists()


def test_a_run_that_fails_is_closed_with_why(tmp_path, digits, mae_scale):
    data, out, log = tmp_path / "data", tmp_path / "run", tmp_path / "log.txt"
    data.mkdir()
    for number, image in enumerate(sorted((digits / "train").rglob("*.jpg"))[:64]):
        (data / f"{number:03d}.jpg").write_bytes(image.read_bytes())
    command = ["pretrain", "demo", "--out", out, "--tracking-uri", "off", *arguments(digits), f"data.root={data}"]
    command += ["data.global_batch=64", "data.on_bad_image=stop"]
    assert mae_scale(*command, "schedule.stop_after_steps=1").returncode == 0
    (data / "007.jpg").write_bytes(b"not a picture")
    failed = mae_scale(*command, "--quiet", "--log-file", log)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    why = failed.stderr.strip().removeprefix("error: ")
    assert "007.jpg" in why
    assert events(out)[2:] == [("start", 1, None), ("failure", 1, why)]
    assert log.read_text().splitlines()[-1] == f"error: {why}"
