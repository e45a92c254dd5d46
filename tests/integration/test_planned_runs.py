"""What runs say of their plan: what they were planned to take, and how far off that was."""

import json
import re
import sqlite3

import pytest

from mae_scale.tracking.metrics_log import read_metrics
from tests.tiny import arguments

RATES = {
    "device": "cpu",
    "device_type": "cpu",
    "product_tflops": {"64": 0.05, "256": 0.06},
    "attention_tflops": 0.03,
    "elementwise_gb_s": 20.0,
    "optimizer_gb_s": 20.0,
}
PLAN = {"plan/step_time_s", "plan/memory_gib"}


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    """A file as `mae-scale plan --measure` writes it, of a CPU."""
    path = tmp_path_factory.mktemp("rates") / "rates.json"
    path.write_text(json.dumps(RATES))
    return path


def pretrain(digits, out, rates, *more) -> list:
    words = ["pretrain", "demo", "--out", out, f"tracking.rates={rates}", "tracking.log_every_steps=1"]
    return [*words, *arguments(digits, *more)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits, mae_scale, rates):
    """A run in two starts, planned by a file of rates: its folder, and what each start said."""
    out = tmp_path_factory.mktemp("planned") / "run"
    said = []
    for last in (5, 10):
        done = mae_scale(*pretrain(digits, out, rates, f"schedule.stop_after_steps={last}", "engine.zero_stage=1"))
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    return out, said


def test_the_first_row_of_each_start_says_what_a_step_was_planned_to_take(trained, call, tmp_path, digits, rates):
    out, _ = trained
    planned = {row["step"]: row["plan/step_time_s"] for row in read_metrics(out / "metrics.jsonl") if PLAN & row.keys()}
    assert list(planned) == [1, 6]
    words = arguments(digits, "engine.zero_stage=1", "engine.precision=fp32", "engine.compile=false")
    shape = ("--gpus-per-node", 1, "--calibrate", rates, "--json", tmp_path / "plan.json")
    code, _, error = call("plan", "demo", *shape, *words)
    assert code == 0, error
    asked = json.loads((tmp_path / "plan.json").read_text())["step_time_s"]
    assert list(planned.values()) == pytest.approx([asked, asked])


def test_the_end_says_how_far_off_the_plan_was(trained):
    out, said = trained
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    ends = [row for row in events if row["event"] == "end"]
    rows = read_metrics(out / "metrics.jsonl")
    for text, end, steps in zip(said, ends, ((2, 5), (7, 10)), strict=True):
        plan, took = end["plan"]["plan/step_time_s"]
        computed = [r["perf/step_time_s"] - r["perf/data_wait_s"] for r in rows if steps[0] <= r["step"] <= steps[1]]
        assert min(computed) <= took <= max(computed)
        line = re.search(r"planned: (\S+) ms per step, took (\S+) ms \((\d+)% (more|less)\)\n", text)
        assert float(line[1]) == pytest.approx(1000 * plan, abs=0.06)
        assert float(line[2].replace(",", "")) == pytest.approx(1000 * took, abs=0.06)
        assert (line[4] == "more") == (took >= plan)
        assert int(line[3]) == pytest.approx(100 * abs(took / plan - 1), abs=0.51)


def test_mlflow_and_the_report_show_it_beside_what_was_taken(trained, call, tmp_path):
    out, _ = trained
    planned = [row["plan/step_time_s"] for row in read_metrics(out / "metrics.jsonl") if PLAN & row.keys()]
    with sqlite3.connect(out.parent / "mlflow.db") as database:
        found = database.execute("SELECT value FROM metrics WHERE key = 'planned_step_time_s' ORDER BY step").fetchall()
    assert [value for (value,) in found] == planned
    code, _, error = call("report", out, "--out", tmp_path / "page.html")
    assert code == 0, error
    page = (tmp_path / "page.html").read_text()
    assert "ms/step (planned)" in page
    assert re.search(rf">[\d.,]+ \({1000 * planned[-1]:,.1f}\)<", page)


def test_a_cpu_without_measured_rates_has_no_plan(digits, mae_scale, tmp_path):
    out = tmp_path / "run"
    done = mae_scale("pretrain", "demo", "--out", out, *arguments(digits, "schedule.stop_after_steps=3"))
    assert done.returncode == 0, done.stderr
    assert "planned" not in done.stdout
    assert not any(PLAN & row.keys() for row in read_metrics(out / "metrics.jsonl"))
    assert '"plan"' not in (out / "events.jsonl").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{}", "has none of product_tflops, attention_tflops"),
        ('{"product_tflops": -1}', "product_tflops is -1; expected a positive number"),
        ('{"product_tflops": 1, "device_type": "cpu"}', "lacks attention_tflops, elementwise_gb_s, optimizer_gb_s"),
        (json.dumps({**RATES, "device": "NVIDIA H100", "device_type": "cuda"}), "is of NVIDIA H100; this is a CPU"),
    ],
)
def test_rates_that_cannot_be_used_are_refused_before_a_run_begins(content, message, digits, call, tmp_path):
    rates, out = tmp_path / "rates.json", tmp_path / "run"
    if content is not None:
        rates.write_text(content)
    code, said, error = call(*pretrain(digits, out, rates), "--dry-run")
    assert (code, said, error.count("\n")) == (2, "", 1)
    assert f"tracking.rates={rates}" in error
    assert message in error
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_is_measured_on_two_ranks_has_their_link_and_plans_a_run(mae_scale, call, tmp_path):
    rates = tmp_path / "rates.json"
    done = mae_scale("plan", "--measure", rates, "--nproc", 2)
    assert (done.returncode, done.stdout) == (0, f"cpu, fp32, 2 rank(s): {rates}\n"), done.stderr
    found = json.loads(rates.read_text())
    assert 0.01 < found["node_link_gb_s"] < 1000
    code, said, error = call("plan", "demo", "data.root=x", "--gpus-per-node", 2, "--calibrate", rates)
    assert code == 0, error
    assert "elementwise_gb_s, node_link_gb_s, optimizer_gb_s, product_tflops" in said
