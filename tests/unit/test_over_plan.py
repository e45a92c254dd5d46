"""How far off a plan was, from the rows of a run."""

import json
from types import SimpleNamespace

import pytest
import torch

from mae_scale.config.load import load_recipe
from mae_scale.training.planned import MEMORY, STEP_TIME, over_plan, over_plan_line
from mae_scale.training.run import _planned


def row(step: int, seconds: float, gib: float = 1.0, wait: float = 0.0, **plan: float) -> dict:
    return {
        "step": step,
        "perf/step_time_s": seconds,
        "perf/data_wait_s": wait,
        "memory/peak_gib": gib,
        **{f"plan/{name}": value for name, value in plan.items()},
    }


def test_the_warm_up_and_waiting_for_images_are_left_out_and_memory_is_the_peak():
    slow = [row(1, 9.0, gib=2, step_time_s=0.5, memory_gib=4.0), row(10, 5.0, gib=6)]
    rows = [*slow, *(row(10 * n, 0.9, gib=5, wait=0.3) for n in range(2, 11))]
    found = over_plan(rows)
    assert found == {STEP_TIME: (0.5, pytest.approx(0.6)), MEMORY: (4.0, 6)}
    assert (
        over_plan_line(found)
        == "planned: 500.0 ms per step, took 600.0 ms (20% more); 4.0 GiB, took 6.0 GiB (50% more)"
    )


def test_only_the_newest_start_counts():
    first = [row(1, 9.0, step_time_s=2.0), *(row(n, 2.0) for n in range(2, 51))]
    second = [row(51, 9.0, step_time_s=1.0), *(row(n, 0.9) for n in range(52, 101))]
    assert over_plan([*first, *second]) == {STEP_TIME: (1.0, 0.9)}
    assert over_plan_line(over_plan([*first, *second])) == "planned: 1,000.0 ms per step, took 900.0 ms (10% less)"


def test_a_start_without_a_plan_or_with_one_row_says_nothing_of_time():
    assert over_plan([]) == over_plan([row(1, 1.0), row(2, 1.0)]) == over_plan([row(1, 1.0, step_time_s=1.0)]) == {}
    assert over_plan_line({}) == ""


def test_a_run_goes_on_when_what_it_takes_cannot_be_told(tmp_path, caplog):
    rates = tmp_path / "rates.json"
    names = ("product_tflops", "attention_tflops", "elementwise_gb_s", "optimizer_gb_s")
    rates.write_text(json.dumps({**dict.fromkeys(names, 1.0), "device_type": "cpu"}))

    def workload(classes: int) -> None:
        raise NotImplementedError("a task of one's own")

    task = SimpleNamespace(workload=workload, number_of_classes=lambda index: len(index.classes))
    index = SimpleNamespace(classes=["one"])
    recipe = load_recipe("demo", [f"tracking.rates={rates}"])
    context = SimpleNamespace(recipe=recipe, device=torch.device("cpu"), index=index)
    assert _planned(task, context) == {}
    assert "what this start takes cannot be planned (NotImplementedError: a task of one's own)" in caplog.text
