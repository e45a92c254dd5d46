"""`mae-scale report`: one page on real runs, on odd ones, on a thousand, and of an MLflow experiment."""

import json
import platform
import re
import shutil
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from mae_scale.tracking.metrics_log import read_metrics
from mae_scale.training.run_lock import hold
from tests.run_folders import DONE, START, put_run, rows_of
from tests.tiny import STEPS, arguments

MEGABYTE = 1_000_000


class Tables(HTMLParser):
    """The cells of a page's tables, and its elements' tags."""

    def __init__(self, page: str):
        super().__init__()
        self.rows, self.tags, self.data, self._cell = [], [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        self._cell = tag in ("td", "th") or (self._cell and tag in ("span", "button"))

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data


def runs_of(page: Path) -> dict[str, dict[str, str]]:
    """{run: {column: cell}} of the page's first table."""
    head, *rows = Tables(page.read_text(encoding="utf-8").partition("</table>")[0]).rows
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def data_of(page: Path) -> dict:
    """The numbers that the charts draw."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))[1])


@pytest.fixture
def page(tmp_path, call):
    """Report on folders; the page's path, after checking that it was written."""

    def write(*folders) -> Path:
        out = tmp_path / "page" / "report.html"
        code, _, error = call("report", *folders, "--out", out)
        assert code == 0, error
        return out

    return write


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits, mae_scale):
    """Two starts of a real run, the first stopped early; its folder, and the MLflow database above it."""
    root = tmp_path_factory.mktemp("real")
    out, uri = root / "runs" / "tiny", f"sqlite:///{root}/mlflow.db"
    for more in (["schedule.stop_after_steps=12"], []):
        words = ["pretrain", "demo", "--out", out, "--tracking-uri", uri, *arguments(digits, *more)]
        done = mae_scale(*words, "tracking.evaluate_every_epochs=1", "checkpoint.every_epochs=1")
        assert done.returncode == 0, done.stderr
    return out, uri


def test_a_real_run_is_shown_with_its_values_events_pictures_and_environment(trained, page):
    out, _ = trained
    written = page(out.parent)
    text = written.read_text(encoding="utf-8")
    rows = read_metrics(out / "metrics.jsonl")
    shown = runs_of(written)["tiny"]
    assert (shown["kind"], shown["encoder"], shown["epochs"], shown["state"]) == ("pretrain", "32x2", "2 of 2", "done")
    assert shown["val loss"] == f"{rows[-1]['val/loss']:.4f}"
    last_epoch = [row["train/loss"] for row in rows if row["epoch"] > 1]
    assert shown["train loss"] == f"{sum(last_epoch) / len(last_epoch):.4f}"
    (group,) = data_of(written)["groups"]
    losses = next(chart for chart in group["charts"] if chart["metric"] == "train/loss")["series"][0]
    assert data_of(written)["epochs"][losses[0]] == [float(f"{row['epoch']:.6g}") for row in rows]
    assert losses[1] == [float(f"{row['train/loss']:.4g}") for row in rows]
    assert len(rows) == STEPS
    found = Tables(text).rows
    assert [row[2] for row in found if len(row) == 4 and row[2] in ("start", "end", "warning", "stop")].count(
        "end"
    ) == 2
    assert ["host", platform.node()] in found
    assert [row[0] for row in found if len(row) == 2 and row[0] in ("torch", "deepspeed", "dali", "python")]
    assert 'src="data:image/webp;base64,' in text
    assert 'alt="Validation images of tiny: original, with removed patches, and reconstructed"' in text
    assert len(text) < MEGABYTE


def test_nothing_in_the_page_comes_from_elsewhere(trained, page):
    written = page(trained[0])
    for tag, attributes in Tables(written.read_text(encoding="utf-8")).tags:
        sources = [value for name, value in attributes.items() if name in ("src", "href", "srcset", "action", "data")]
        assert all(source.startswith("data:") for source in sources), (tag, sources)
    assert "default-src 'none'" in written.read_text(encoding="utf-8")


def test_a_start_notes_where_it_runs(trained):
    start = json.loads((trained[0] / "events.jsonl").read_text().splitlines()[0])
    assert (start["host"], start["device"]) == (platform.node(), "cpu")
    assert {"mae-scale", "torch", "deepspeed", "dali"} <= start["versions"].keys()


def test_the_runs_of_an_mlflow_experiment_are_the_same(trained, tmp_path, call, page):
    out, uri = trained
    expected = runs_of(page(out))["tiny"]
    written = tmp_path / "tracked.html"
    code, _, error = call("report", "mae-scale", "--tracking-uri", uri, "--out", written)
    assert code == 0, error
    ((name, found),) = runs_of(written).items()
    assert name == "tiny, pretrain 32x2, seed 0"
    same = ("kind", "encoder", "seed", "epochs", "state", "val loss")
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    (one,), (other,) = (data_of(path)["groups"] for path in (written, tmp_path / "page" / "report.html"))
    assert [chart["metric"] for chart in one["charts"]] == [chart["metric"] for chart in other["charts"]]
    assert one["charts"][0]["series"][0][1] == other["charts"][0]["series"][0][1]


@pytest.mark.parametrize(
    ("rows", "events", "state"),
    [
        (20, [START, DONE], "done"),
        (10, [START, {**DONE, "reason": "stopped early"}], "stopped early"),
        (10, [START, {"step": 9, "event": "stop", "reason": "SIGTERM", "time": 1200.0}], "stopped SIGTERM"),
        (10, [START, {"step": 9, "event": "failure", "reason": "no memory", "time": 1200.0}], "failed no memory"),
        (10, [START], "killed"),
        (0, [], "not started"),
        (20, [START, DONE, START | {"time": 1500.0}, {**DONE, "reason": "nothing to do", "time": 1501.0}], "done"),
    ],
)
def test_the_state_of_a_run_is_that_of_its_newest_start(rows, events, state, tmp_path, page):
    put_run(tmp_path / "runs" / "one", rows=rows_of(20)[:rows], events=events)
    assert runs_of(page(tmp_path / "runs"))["one"]["state"] == state


def test_a_run_that_holds_its_folder_is_running_and_was_not_killed(tmp_path, page):
    folder = put_run(tmp_path / "one", rows=rows_of(20)[:10], events=[START])
    with hold(folder):
        written = page(folder)
    assert runs_of(written)["one"]["state"] == "running"
    assert "was killed" not in written.read_text()
    assert runs_of(page(folder))["one"]["state"] == "killed"


def test_kills_rollbacks_and_warnings_stand_among_the_events(tmp_path, page):
    events = [
        START,
        {"step": 3, "event": "warning", "kind": "rising_loss", "reason": "it rises", "time": 1003.5},
        {"step": 2, "event": "rollback", "reason": "20 steps not finite", "skipped_batches": 7, "time": 1004.5},
        START | {"step": 6, "time": 1100.0, "host": "n7"},
        DONE,
    ]
    put_run(tmp_path / "one", rows=rows_of(20), events=events)
    found = [row[1:] for row in Tables(page(tmp_path / "one").read_text()).rows if len(row) == 4 and ":" in row[0]]
    assert found == [
        ["0", "start", "2 ranks, deepspeed ZeRO 2"],
        ["3", "warning", "rising_loss: it rises"],
        ["2", "rollback", "20 steps not finite: 7 batches skipped"],
        ["20", "killed", "no end of this start was noted: the process, its node or its job was killed"],
        ["6", "start", "2 ranks on n7, deepspeed ZeRO 2"],
        ["100", "end", "done"],
    ]


def test_a_sweep_shows_the_keys_that_differ_and_the_transfer_of_each_point(tmp_path, page):
    for ratio in (0.5, 0.75):
        point = put_run(tmp_path / "sweep" / f"mask-{ratio}", f"model.mask_ratio={ratio}", rows=rows_of(20))
        put_run(point / "then", recipe="probe/demo", rows=[{**row, "val/top1": 71.25} for row in rows_of(20)])
    shutil.copytree(tmp_path / "sweep" / "mask-0.5", tmp_path / "sweep" / "mlartifacts" / "7f")
    written = page(tmp_path / "sweep")
    found = runs_of(written)
    assert list(found) == ["mask-0.5", "mask-0.5/then", "mask-0.75", "mask-0.75/then"]
    assert [one["kind"] for one in found.values()] == ["pretrain", "probe"] * 2
    assert found["mask-0.5/then"]["top-1, %"] == "71.25"
    rows = Tables(written.read_text()).rows
    assert ["run", "model.mask_ratio"] in rows
    assert ["mask-0.75", "0.75"] in rows
    assert [group["kind"] for group in data_of(written)["groups"]] == ["pretrain", "probe"]


def test_figures_beside_the_runs_and_throughput_against_ranks_are_in_the_page(tmp_path, page):
    for ranks in (1, 2):
        rows = [{**row, "perf/images_per_second": 90.0 * ranks} for row in rows_of(20)]
        put_run(tmp_path / "scaling" / f"ranks_{ranks:04d}", rows=rows, events=[START | {"world_size": ranks}, DONE])
    Image.new("RGBA", (1200, 300), (0, 90, 0, 255)).save(tmp_path / "scaling" / "fit.png")
    text = page(tmp_path / "scaling").read_text()
    pictures = [attributes for tag, attributes in Tables(text).tags if tag == "img"]
    assert [one["alt"] for one in pictures] == [
        "Figure fit.png of scaling",
        "Images per second, efficiency and time per step against ranks, of scaling",
    ]
    assert (pictures[0]["width"], pictures[0]["height"]) == ("900", "225")


EVIL = "</script><script>alert('1')</script>"


def test_text_from_outside_is_escaped_and_passwords_are_left_out(tmp_path, page):
    events = [START, {"step": 1, "event": "failure", "reason": f"{EVIL} at http://me:secret@host", "time": 1200.0}]
    put_run(tmp_path / "runs" / "<img src=x onerror=alert(1)>", rows=rows_of(20), events=events)
    put_run(tmp_path / "runs" / "b&b", f"tracking.run_name={EVIL}", rows=rows_of(20))
    written = page(tmp_path / "runs")
    text = written.read_text(encoding="utf-8")
    assert "secret" not in text
    assert "<img src=x" not in text
    assert EVIL not in text
    assert [tag for tag, _ in Tables(text).tags].count("script") == 3  # the data, the library, ours
    assert "alert('1')" in unescape(text)
    assert data_of(written)["groups"][0]["runs"] == ["<img src=x onerror=alert(1)>", "b&b"]
    assert list(runs_of(written)) == ["<img src=x onerror=alert(1)>", "b&b"]


def test_a_name_that_is_not_utf_8_is_shown_as_far_as_it_can_be(tmp_path, page):
    put_run(Path(f"{tmp_path}/runs/\udcff"), rows=rows_of(20))
    assert list(runs_of(page(tmp_path / "runs"))) == ["?"]


def test_a_run_without_metrics_and_damaged_files_are_shown_and_said(tmp_path, call):
    root, out = tmp_path / "runs", tmp_path / "r.html"
    put_run(root / "a_new", events=[START])
    put_run(root / "b_damaged", rows=rows_of(20))
    with open(root / "b_damaged" / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe\x00\n{"step": 21}\n[1, 2]\n{"step": 22, "ti')
    (root / "b_damaged" / "events.jsonl").write_text('{"step": 0, "time": 1}\nnonsense\n')
    (root / "c_recipe").mkdir()
    (root / "c_recipe" / "recipe.yaml").write_text("model: [")
    put_run(root / "d_nan", rows=[{**row, "train/loss": "NaN"} for row in rows_of(20)])
    code, said, error = call("report", root, "--out", out)
    assert code == 0, error
    assert error.splitlines() == [
        "note: b_damaged: metrics.jsonl has 3 damaged line(s), which are left out",
        "note: b_damaged: events.jsonl has 1 damaged line(s), which are left out",
        "note: c_recipe: recipe.yaml is damaged: it is not valid YAML",
    ]
    assert "4 runs" in said
    found = runs_of(out)
    assert (found["a_new"]["epochs"], found["a_new"]["train loss"]) == ("0 of 20", "")
    assert found["b_damaged"]["epochs"] == "20 of 20"
    assert found["c_recipe"]["kind"] == "unknown"
    assert found["d_nan"]["train loss"] == ""
    assert "events.jsonl has 1 damaged line(s)" in out.read_text()


def test_a_page_of_runs_without_a_step_says_so(tmp_path, page):
    put_run(tmp_path / "one", events=[START])
    assert "No run has logged a step yet." in page(tmp_path / "one").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["EMPTY"], "empty has no run; expected a run's folder, with its recipe.yaml, or a folder of such folders"),
        (["EMPTY/nothing"], "nothing does not exist; expected a run's folder or a folder of runs; for an experiment"),
        (["FILE"], "file is not a folder"),
        (["RUN", "EMPTY/nothing"], "nothing does not exist"),
        (["RUN", "--out", "a.pdf"], "--out a.pdf: expected a name that ends in .html"),
        (["RUN", "--out", "FILE/a.html"], "a.html cannot be written: "),
        (["RUN", "--out", "FOLDER.html"], "is a folder; give the name of a file in it"),
        (["none", "--tracking-uri", "sqlite:///EMPTY/no.db"], "no.db does not exist; give --tracking-uri of the one"),
        (["none", "--tracking-uri", "off"], "tracking is off, so there is no experiment none"),
        (["none", "--tracking-uri", "http://127.0.0.1:9"], "MLflow (http://127.0.0.1:9) cannot be read: Connection re"),
        (["RUN", "RUN", "--tracking-uri", "off"], "--tracking-uri takes the name of one experiment, and found 2 names"),
    ],
)
def test_what_cannot_be_reported_is_refused_in_one_line(words, said, tmp_path, call, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    put_run(tmp_path / "run", rows=rows_of(20))
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("in the way")
    places = {"RUN": "run", "EMPTY": "empty", "FILE": "file", "FOLDER.html": "folder.html"}
    words = [re.sub("|".join(places), lambda found: f"{tmp_path}/{places[found[0]]}", word) for word in words]
    code, _, error = call("report", *words)
    assert (code, error.count("\n")) == (2, 1)
    assert said in error


def test_an_experiment_that_mlflow_does_not_have_is_refused_with_those_it_has(trained, call):
    code, _, error = call("report", "mae-scal", "--tracking-uri", trained[1])
    assert (code, error.count("\n")) == (2, 1)
    assert "mae-scal is neither a folder nor an experiment of MLflow" in error
    assert "which has Default, mae-scale" in error


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_thousand_runs_are_one_page_in_less_than_a_minute_and_five_megabytes(tmp_path, page):
    template = put_run(tmp_path / "template", rows=rows_of(200))
    recipe = (template / "recipe.yaml").read_text()
    for number in range(1000):
        folder = tmp_path / "sweep" / f"mask_ratio-{number / 1000:.3f}_seed-{number % 3}"
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(recipe.replace("seed: 0", f"seed: {number % 3}"))
        # Epochs of its own: the worst case, in which runs share none.
        rows = rows_of(200, epochs=20 - number / 1000, offset=number / 1000)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shutil.copy(template / "events.jsonl", folder)
        if number < 40:
            (folder / "figures" / "reconstructions").mkdir(parents=True)
            Image.effect_noise((1206, 852), 80).save(folder / "figures" / "reconstructions" / "step_00000100.png")
    began = time.monotonic()
    written = page(tmp_path / "sweep")
    assert time.monotonic() - began < 60
    assert written.stat().st_size < 5 * MEGABYTE
    assert len(runs_of(written)) == 1000
    (group,) = data_of(written)["groups"]
    assert len(group["charts"][0]["series"]) == 1000
    assert all(series is not None for series in group["charts"][0]["series"])
