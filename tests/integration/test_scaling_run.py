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
    assert json.loads((out / "scaling.json").read_text())["ranks"] == [1, 2]
    shutil.rmtree(out / "ranks_0002")
    assert "ranks_0002      -  not measured yet" in mae_scale("scaling", "report", out).stdout
    without = mae_scale(*sweep_of(digits, out, "--ranks", "2", "--kind", "weak"))
    assert (without.returncode, without.stderr.count("\n")) == (2, 1)
    assert "--ranks 2: the weak sweep in" in without.stderr
    other = mae_scale(*sweep_of(digits, out, "--ranks", "1,2"))
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "holds another sweep (kind: weak -> strong); choose another --out" in other.stderr


def put_point(
    folder, ranks: int, step_s: list[float], events: list[dict], wait: float = 0.0, micro: int = 100, **more: float
) -> None:
    """A run's folder as training leaves it: a row every ten steps with the time of a step, 100 images each per rank.

    more: for the first row.
    """
    folder.mkdir(parents=True)
    (folder / "engine.json").write_text(json.dumps({"used": {"engine.micro_batch": micro}}))
    rows = [{"step": 0, "event": "start", "world_size": ranks, "time": 0}, *events]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with MetricsLog(folder / "metrics.jsonl") as log:
        for number, seconds in enumerate(step_s, start=1):
            values = {"perf/images_per_second": 100 * ranks / seconds, "perf/step_time_s": seconds}
            log.append(10 * number, number, values | {"perf/data_wait_s": wait * seconds} | more)
            more = {}


SAVED = {"saves": 1, "save_stall_s": 0.5, "steps_per_save": 50}
END = [{"step": 100, "event": "end", "reason": "stopped early", "time": 9, **SAVED}]


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
    # 1.25 s a step: 0.25 s of waiting and, as on one rank, 1 s of compute; saving is beside it, 0.5 s each 50 steps.
    assert lines[2].split()[-6:] == ["80.0%", "1,250.00", "1,000.00", "0.00", "250.00", "10.00"]
    assert lines[5].startswith("communication: what a step takes beyond that of 1 rank(s) with the same work per rank;")
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size > (1000, 400)


def test_what_was_planned_stands_beside_what_was_measured(tmp_path, call):
    root = tmp_path / "points"
    put_point(root / "ranks_0001", 1, [1.0] * 10, END, **{"plan/step_time_s": 0.8})
    put_point(root / "ranks_0002", 2, [1.25] * 10, END)
    code, said, error = call("scaling", "report", root, "--out", tmp_path / "s.png", "--json", tmp_path / "s.json")
    assert code == 0, error
    head, one, two = said.splitlines()[:3]
    place = head.index("planned") + len("planned")
    assert (one[:place].split()[-2:], two[:place].split()[-2:]) == (["1,000.00", "800.00"], ["1,250.00", "-"])
    assert [row["planned_step_time_s"] for row in json.loads((tmp_path / "s.json").read_text())] == [0.8, None]
    measured_only = tmp_path / "measured.png"
    shutil.rmtree(root / "ranks_0001")
    put_point(root / "ranks_0001", 1, [1.0] * 10, END)
    assert "planned" not in call("scaling", "report", root, "--out", measured_only)[1].splitlines()[0]
    with Image.open(tmp_path / "s.png") as planned, Image.open(measured_only) as without:
        assert planned.tobytes() != without.tobytes()


def test_rows_that_are_not_whole_are_left_out(tmp_path, call):
    put_point(tmp_path / "points" / "ranks_0001", 1, [1.0] * 10, END)
    with open(tmp_path / "points" / "ranks_0001" / "metrics.jsonl", "a") as file:
        file.write('{"step": 101, "time": 1, "plan/step_time_s": "x"}\n')
        file.write('{"step": 102, "time": 2, "perf/images_per_second": "?"}\n')
    code, said, error = call("scaling", "report", tmp_path / "points")
    assert (code, error) == (0, "")
    assert said.splitlines()[1].split()[:3] == ["ranks_0001", "1", "100.0"]


PARTS = ("compute_s", "communication_s", "data_wait_s", "checkpoint_s")


def parts_of(call, folder, json_file) -> tuple[list[str], dict[str, list[float | None]]]:
    """The table's lines, and by name the parts of a step in seconds."""
    code, said, error = call("scaling", "report", folder, "--json", json_file)
    assert code == 0, error
    rows = [row for row in json.loads(json_file.read_text()) if "step_time_s" in row]
    for row in rows:
        told = row["data_wait_s"] + row["rest_s"]
        assert told == pytest.approx(row["step_time_s"])
        if row["compute_s"] is not None:
            assert row["compute_s"] + row["communication_s"] == pytest.approx(row["rest_s"])
    return said.splitlines(), {row["name"]: [row[part] for part in PARTS] for row in rows}


def test_communication_is_what_a_step_takes_beyond_that_of_one_rank_with_the_same_micro_batch(tmp_path, call):
    root = tmp_path / "points"
    put_point(root / "ranks_0001", 1, [1.0] * 10, END, wait=0.1)
    put_point(root / "ranks_0002", 2, [1.5] * 10, END, wait=0.2)
    put_point(root / "ranks_0004", 4, [1.5] * 10, END, micro=50)
    lines, parts = parts_of(call, root, tmp_path / "s.json")
    assert parts["ranks_0001"] == pytest.approx([0.9, 0.0, 0.1, 0.01])
    assert parts["ranks_0002"] == pytest.approx([0.9, 0.3, 0.3, 0.01])
    assert parts["ranks_0004"] == [None, None, 0.0, pytest.approx(0.01)]
    assert lines[3].split()[-4:] == ["1,500.00*", "-", "0.00", "10.00"]
    told = "* with communication, which cannot be told: micro-batches differ, 100 on 1 rank(s) and 50 on 4 ("
    assert lines[-1].startswith(told)


def test_half_the_micro_batches_are_half_the_compute_and_fewest_ranks_of_a_node_are_named(tmp_path, call):
    """Strong scaling by accumulation, from one node of two ranks on."""
    root = tmp_path / "points"
    put_point(root / "nodes_0001", 2, [1.0] * 10, END, micro=10)
    put_point(root / "nodes_0002", 4, [0.6] * 10, END, micro=10)
    rows = (root / "nodes_0002" / "metrics.jsonl").read_text()  # half the images per rank
    slow, fast = 400 / 0.6, 200 / 0.6
    (root / "nodes_0002" / "metrics.jsonl").write_text(rows.replace(str(slow), str(fast)))
    lines, parts = parts_of(call, root, tmp_path / "s.json")
    assert parts["nodes_0001"] == pytest.approx([1.0, 0.0, 0.0, 0.01])
    assert parts["nodes_0002"] == pytest.approx([0.5, 0.1, 0.0, 0.01])
    assert "compute: with the communication among 2 ranks, which is not told without a point of one" in lines


def test_the_report_of_a_real_sweep(measured, tmp_path, call):
    lines, parts = parts_of(call, measured[0], tmp_path / "s.json")
    head, first, second, note = lines
    compute, communication, waiting, checkpoint = parts["ranks_0001"]
    assert compute > 0 == communication
    assert waiting >= 0 < checkpoint
    assert parts["ranks_0002"][:2] == [None, None]  # they share this machine's cores
    assert "*" in second
    assert note.startswith("* with communication, which cannot be told: ranks on the CPUs of one machine")
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
        (["run", "demo", "--ranks", "1,7", "--kind", "strong"], "data.global_batch=120 is not divisible by 7 ranks"),
        (["run", "demo", "--ranks", "7,14", "--kind", "weak"], "data.global_batch=120 is not divisible by 7 ranks"),
        (["report", "NOWHERE"], "has no points"),
        (["report", "NOWHERE/there"], "has no points"),
        (["report", __file__], "is a file; expected the folder of `mae-scale scaling run`"),
        (["report", "NOWHERE", "--out", "a.pdf"], "--out a.pdf: expected a name that ends in .png"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_started(words, said, tmp_path, digits, call):
    words = [word.replace("NOWHERE", str(tmp_path)) for word in words]
    more = [*arguments(digits), "--out", tmp_path / "new"] if words[0] == "run" else []
    code, _, error = call("scaling", *words, *more)
    assert (code, error.count("\n")) == (2, 1)
    assert said in error
    assert not (tmp_path / "new").exists()


def test_folders_of_other_runs_are_no_points_and_points_of_different_recipes_are_refused(tmp_path, call):
    for name, recipe in (("lr_1", "extends: demo"), ("ranks_0001", "extends: demo")):
        put_point(tmp_path / name, 1, [1.0] * 4, END)
        (tmp_path / name / "recipe.yaml").write_text(recipe)
    assert "lr_1" not in call("scaling", "report", tmp_path)[1]
    put_point(tmp_path / "ranks_0002", 2, [1.0] * 4, END)
    (tmp_path / "ranks_0002" / "recipe.yaml").write_text("extends: demo\ndata: {global_batch: 8}\nmodel: {depth: 3}")
    code, _, error = call("scaling", "report", tmp_path)
    assert (code, error.count("\n")) == (2, 1)
    assert "points of different recipes (ranks_0001 and ranks_0002: model.depth:" in error
    assert "global_batch" not in error


@pytest.mark.parametrize("content", ["{", "[]", '{"ranks": ["x"]}'])
def test_a_damaged_file_of_a_sweep_is_one_line(content, tmp_path, digits, call):
    (tmp_path / "scaling.json").write_text(content)
    for words in (["report", tmp_path], ["run", "demo", "--ranks", "1", "--out", tmp_path, *arguments(digits)]):
        code, _, error = call("scaling", *words)
        assert (code, error.count("\n")) == (2, 1)
        assert "scaling.json cannot be read" in error


def test_images_that_are_not_there_are_refused_before_anything_is_written(tmp_path, call):
    root, out = tmp_path / "none", tmp_path / "sweep"
    code, said, error = call("scaling", "run", "demo", "--ranks", "1,2", "--out", out, f"data.root={root}")
    assert (code, said, error.count("\n")) == (2, "", 1)
    assert str(root) in error
    assert list(tmp_path.iterdir()) == []
