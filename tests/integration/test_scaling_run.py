"""`mae-scale scaling run` and `report`: throughput on one and two ranks of this machine."""

import json
import shutil

import pytest
from PIL import Image

from mae_scale.tracking.metrics_log import MetricsLog
from tests.tiny import arguments

STEPS = 20


def sweep_of(digits, out, *more) -> list:
    words = ["scaling", "run", "demo", "--out", out, "--steps", STEPS, *more]
    return [*words, *arguments(digits, "schedule.epochs=9", "tracking.uri=off")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, digits, mae_scale):
    """A weak sweep over one and two ranks: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("scaling") / "weak"
    done = mae_scale(*sweep_of(digits, out, "--ranks", "2,1", "--kind", "weak"))
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_each_point_is_an_ordinary_run_on_its_ranks_with_its_share_of_the_batch(measured):
    out, said = measured
    assert said.index("1 rank(s)") < said.index("2 rank(s)")
    for ranks in (1, 2):
        folder = out / f"ranks_{ranks:04d}"
        (start, *_, end) = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        assert (start["world_size"], end["step"]) == (ranks, STEPS)
        assert f"global_batch: {120 * ranks}\n" in (folder / "recipe.yaml").read_text()


def test_a_second_call_measures_only_what_is_missing(measured, tmp_path, digits, mae_scale):
    out = shutil.copytree(measured[0], tmp_path / "weak")
    kept = (out / "ranks_0001" / "metrics.jsonl").read_bytes()
    shutil.rmtree(out / "ranks_0002")
    done = mae_scale(*sweep_of(digits, out, "--ranks", "1,2", "--kind", "weak"))
    assert done.returncode == 0, done.stderr
    assert f"{out}/ranks_0001: measured already" in done.stdout
    assert (out / "ranks_0001" / "metrics.jsonl").read_bytes() == kept
    assert (out / "ranks_0002" / "metrics.jsonl").exists()
    other = mae_scale(*sweep_of(digits, out, "--ranks", "1,2"))
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "holds another sweep (kind: weak -> strong); choose another --out" in other.stderr


def put_point(folder, ranks: int, step_s: list[float], events: list[dict], wait: float = 0.0) -> None:
    """A run's folder as training leaves it: a row every ten steps with the time of a step, 100 images each per rank."""
    folder.mkdir(parents=True)
    rows = [{"step": 0, "event": "start", "world_size": ranks, "time": 0}, *events]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with MetricsLog(folder / "metrics.jsonl") as log:
        for number, seconds in enumerate(step_s, start=1):
            values = {"perf/images_per_second": 100 * ranks / seconds, "perf/step_time_s": seconds}
            log.append(10 * number, number, values | {"perf/data_wait_s": wait * seconds})


END = [{"step": 100, "event": "end", "reason": "stopped early", "time": 9}]


def test_the_report_leaves_the_warm_up_out_and_shows_what_failed_or_still_runs(tmp_path, call):
    root = tmp_path / "points"
    put_point(root / "ranks_0001", 1, [9, 8, *[1.0] * 8], END)
    put_point(root / "ranks_0002", 2, [9, 8, 1.2, 1.25, 1.25, 1.25, 1.25, 1.3, 1.25, 1.25], END, wait=0.2)
    put_point(root / "ranks_0004", 4, [], [{"step": 0, "event": "failure", "reason": "no memory", "time": 1}])
    put_point(root / "ranks_0008", 8, [9, 2, 2, 2], [])
    code, said, error = call("scaling", "report", root, "--out", tmp_path / "s.png", "--json", tmp_path / "s.json")
    assert code == 0, error
    one, two, four, eight = json.loads((tmp_path / "s.json").read_text())
    assert (one["images_per_second"], one["efficiency"], one["intervals"], one["state"]) == (100, 1, 8, "done")
    assert (two["images_per_second"], two["efficiency"]) == (160, pytest.approx(0.8))
    assert two["data_wait_s"] == pytest.approx(0.25)
    assert four == {"name": "ranks_0004", "ranks": 4, "state": "failed: no memory"}
    assert (eight["state"], eight["efficiency"]) == ("running or killed", pytest.approx(0.5))
    lines = said.splitlines()
    assert lines[3].endswith("failed: no memory")
    assert lines[4].endswith("running or killed")
    assert "20.0%" in lines[2]
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size > (1000, 400)


def test_the_report_of_a_real_sweep(measured, call):
    code, said, error = call("scaling", "report", measured[0])
    assert code == 0, error
    head, first, second = said.splitlines()
    assert "efficiency" in head
    assert first.split()[:2] == ["ranks_0001", "1"]
    assert "100.0%" in first
    assert second.split()[:2] == ["ranks_0002", "2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "demo", "--ranks", "1,two"], "--ranks 1,two: expected numbers of ranks, such as 1,2,4"),
        (["run", "demo", "--ranks", "0"], "--ranks 0: expected numbers of ranks"),
        (["run", "demo", "--ranks", "1", "--kind", "stong"], "--kind stong is not known; expected strong or weak"),
        (["run", "demo", "--ranks", "1,7"], "data.global_batch=120 is not divisible by 7 ranks"),
        (["report", "NOWHERE"], "has no folders of runs that have started"),
        (["report", "NOWHERE", "--out", "a.pdf"], "--out a.pdf: expected a name that ends in .png"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_started(words, said, tmp_path, digits, call):
    words = [tmp_path if word == "NOWHERE" else word for word in words]
    more = [*arguments(digits), "--out", tmp_path / "new"] if words[0] == "run" else []
    code, _, error = call("scaling", *words, *more)
    assert (code, error.count("\n")) == (2, 1)
    assert said in error
    assert not (tmp_path / "new").exists()
