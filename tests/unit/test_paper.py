"""The small comparison of the paper: its rule, that every claim can be decided by what is run, and in which order."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from data_pipeline.errors import RunError, UsageError
from mae_scale.reproduce.paper.command import scale_of
from mae_scale.reproduce.paper.findings import FINDINGS, PRETRAININGS, SPEED, TOKENISER, findings_named
from mae_scale.reproduce.paper.page import as_json, look_up, markdown
from mae_scale.reproduce.paper.runs import Scale, runs_of
from mae_scale.reproduce.paper.verdict import OPPOSITE, SAME, UNDECIDED, decide
from mae_scale.reproduce.runs import Run, do

SCALE = Scale(
    Path("data"), Path("out"), epochs=20, labels=10, images=1442, classes=10, smallest_class=139, findings=FINDINGS
)


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_is_a_one_sided_paired_t_test_at_95_percent(seed):
    differences = np.random.default_rng(seed).normal(1, 1, 3)
    above = ttest_1samp(differences, 0, alternative="greater").pvalue < 0.05
    below = ttest_1samp(differences, 0, alternative="less").pvalue < 0.05
    assert decide(list(differences)).word == (SAME if above else OPPOSITE if below else UNDECIDED)


def test_one_seed_decides_nothing_and_equal_differences_decide():
    assert decide([5.0]).word == UNDECIDED
    assert (decide([1.0, 1.0]).word, decide([-1.0, -1.0]).word, decide([0.0, 0.0]).word) == (SAME, OPPOSITE, UNDECIDED)


def test_every_claim_is_of_what_its_findings_table_shows():
    for one in FINDINGS:
        shown = {(arm.pretraining, measure) for arm in one.arms for measure in one.measures}
        for claim in one.claims:
            asked = set()

            def value(pretraining, measure, asked=asked):
                asked.add((pretraining, measure))
                return 1.0

            claim.difference(value)
            assert asked
            assert asked <= shown, (one.title, claim.text)


def test_a_claim_of_the_papers_own_numbers_holds_where_it_gives_them():
    """A difference the wrong way round would call the paper itself wrong."""
    checked = 0
    for one in FINDINGS:
        paper = {(arm.pretraining, m): number for arm in one.arms for m, number in arm.paper.items()}
        for claim in one.claims:
            try:
                difference = claim.difference(lambda *key, paper=paper: paper[key])
            except KeyError:  # the paper has drawn it, or has no number for it
                continue
            checked += 1
            assert difference > 0, (one.title, claim.text)
    assert checked >= 20


def test_every_run_has_a_recipe_that_loads_and_comes_after_what_it_needs():
    names = set()
    for run in runs_of(SCALE, 1):
        assert set(run.needs) <= names, run.name
        recipe = run.recipe()
        assert recipe.seed == 1
        if run.name in PRETRAININGS:
            assert recipe.schedule.epochs == 20 * PRETRAININGS[run.name].share
            assert recipe.schedule.warmup_epochs == pytest.approx(0.1 * recipe.schedule.epochs)
        names.add(run.name)
    asked = {f"{arm.pretraining}.{m}" for one in FINDINGS for arm in one.arms for m in one.measures if m != SPEED}
    assert names - set(PRETRAININGS) - {TOKENISER} == asked


@pytest.mark.parametrize(
    ("images", "classes", "smallest", "labels"), [(1442, 10, 139, 10), (50_000, 10, 5000, 100), (1000, 2, 500, 10)]
)
def test_transfers_make_about_as_many_updates_of_the_same_batch_whatever_the_number_of_labels(
    images, classes, smallest, labels
):
    scale = Scale(Path("data"), Path("out"), 20, labels, images, classes, smallest, FINDINGS)
    updates, batches, shares = {}, set(), set()
    for run in runs_of(scale, 0):
        if run.name in ("mae.finetune", "mae.finetune-4x", "mae.finetune-16x"):
            recipe = run.recipe()
            labelled = classes * recipe.data.labels_per_class
            updates[run.name] = recipe.schedule.epochs * (labelled // recipe.data.global_batch)
            batches.add(recipe.data.global_batch)
            shares.add(round(recipe.schedule.warmup_epochs / recipe.schedule.epochs, 6))
    few = updates["mae.finetune"]
    assert all(abs(found - few) <= 0.25 * few for found in updates.values()), updates
    assert (len(batches), shares) == (1, {0.1})


def test_only_the_findings_that_are_named_are_run():
    (one,) = findings_named(["mask-ratio"])
    scale = Scale(Path("data"), Path("out"), 20, 10, 1442, 10, 139, (one,))
    assert len(runs_of(scale, 0)) == 4 + 8
    with pytest.raises(UsageError, match=r"--finding masks is not known; expected one of mask-ratio, .*, methods"):
        findings_named(["masks"])


def test_runs_of_any_other_setting_are_not_taken_for_these(digits, tmp_path, monkeypatch):
    def asked(**changes):
        words = {"epochs": 20, "labels": 10, "findings": FINDINGS, "overrides": ()} | changes
        return scale_of(digits, tmp_path / "paper", **words)

    asked().runs.mkdir(parents=True)
    asked(findings=FINDINGS[:1], overrides=("data.threads=2",))
    with pytest.raises(UsageError, match=r"another comparison \(epochs: 20 -> 8\); choose another --out"):
        asked(epochs=8)
    monkeypatch.setitem(PRETRAININGS, "small", replace(PRETRAININGS["small"], overrides=("model.width=24",)))
    with pytest.raises(UsageError, match=r"another comparison \(recipes: \w+ -> \w+\)"):
        asked()


def test_runs_are_done_side_by_side_each_after_what_it_needs_and_none_after_a_failure(monkeypatch, tmp_path):
    order = []

    def run(one):
        if one.name == "broken":
            raise RunError("it failed")
        order.append(one.name)

    monkeypatch.setattr("mae_scale.reproduce.runs._do", run)
    todo = [Run(n, tmp_path, (), needs) for n, needs in {"c": ("a", "b"), "a": (), "b": ("a",)}.items()]
    told = []
    do(todo, 2, lambda one: told.append(one.name))
    assert order == told == ["a", "b", "c"]
    with pytest.raises(RunError, match="it failed"):
        do([Run("broken", tmp_path, (), ()), Run("after", tmp_path, (), ("broken",))], 2, told.append)
    assert "after" not in order


def test_the_page_says_what_the_json_says():
    numbers = iter(np.random.default_rng(0).normal(80, 3, 10_000))
    values = [lambda *_: next(numbers) for _ in range(3)]
    found = look_up(values, FINDINGS)
    page, kept = markdown(found, ["about"]), as_json(found, {"seeds": 3})
    for one in kept["findings"]:
        assert f"## {one['title']}" in page
        for claim in one["claims"]:
            assert f"| {claim['claim']} |" in page
            assert math.isclose(claim["mean"], np.mean(claim["differences"]))
            (row,) = [line for line in page.splitlines() if f"| {one['title']} | {claim['claim']} |" in line]
            assert row.endswith(f"| {claim['verdict']} |")
            assert f"{claim['mean']:+.1f} ± {claim['margin']:.1f} " in row


def test_the_documentation_shows_what_the_committed_comparison_found():
    """Of the claims and arms as they stand in the code, with the verdicts that its rule gives now."""
    root = Path(__file__).parents[2]
    kept = json.loads((root / "bench" / "results" / "paper-digits-cpu-2core-epyc.json").read_text())
    values = {
        (arm["run"], measure): found
        for one in kept["findings"]
        for arm in one["arms"]
        for measure, found in arm["values"].items()
    }
    seeds = [lambda run, measure, seed=seed: values[run, measure][seed] for seed in range(kept["seeds"])]
    found = look_up(seeds, FINDINGS)
    assert as_json(found, {})["findings"] == kept["findings"]
    shown = (root / "docs" / "paper.md").read_text().splitlines()
    tables = [line for line in markdown(found, []).splitlines() if line.startswith("|")]
    assert [line for line in tables if line not in shown] == []
