"""bench/cluster_sim.py: what it simulates is what the planner's formulas say, where both apply."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mae_scale.planning.collectives import Cluster, all_gather_s
from mae_scale.planning.failures import RESTART_S, failures_of
from mae_scale.planning.memory import Setting
from mae_scale.planning.step_time import step_time

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import cluster_sim  # noqa: E402
from cluster_events import Conditions, Events, Line, Training, Work, share_lost_to_failures  # noqa: E402

SIMPLE = Work(4, 1, 1.0, 2.0, 1, 1, 0.0, True, 0.0, 0.0, 100.0)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("site", "ranks"), [("h100-ib", 8), ("a100-40gb-ib", 64), ("h100-ethernet", 512)])
def test_without_stragglers_and_with_any_storage_a_step_takes_the_time_of_the_formula(site, ranks, accumulation, stage):
    site, work = cluster_sim.CLUSTERS[site], cluster_sim.workload_of(cluster_sim.RECIPE, cluster_sim.MODELS["ViT-H"])
    cluster, rates = cluster_sim.cluster_of(site, ranks), cluster_sim.rates_at(site)
    setting = Setting(ranks, stage, "bf16", 16, accumulation)
    simulated = Training(cluster_sim.work_of(work, setting, cluster, rates), Conditions(), steps=3, seed=0).run()
    assert simulated.step == pytest.approx(step_time(work, setting, cluster, rates).total, rel=0.02)
    assert simulated.stragglers == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_a_ring_that_moves_message_by_message_takes_the_time_of_the_formula(ranks):
    """An all-gather: each rank sends what it has got last to the next one, over a link that sends one at a time."""
    rates = replace(cluster_sim.rates_at(cluster_sim.CLUSTERS["h100-ib"]), node_link_latency_s=0.0, link_latency_s=0.0)
    size, events = 1e9, Events()
    links, ends = [Line(events) for _ in range(ranks)], []

    def send(rank: int, left: int) -> None:
        seconds = size / ranks / rates.node_link_bytes_per_s
        links[rank].serve(seconds, lambda: receive((rank + 1) % ranks, left - 1))

    def receive(rank: int, left: int) -> None:
        ends.append(events.now)
        if left:
            send(rank, left)

    for rank in range(ranks):
        send(rank, ranks - 1)
    events.run()
    assert len(ends) == ranks * (ranks - 1)
    assert max(ends) == pytest.approx(all_gather_s(size, Cluster(1, ranks), rates))


def test_stragglers_cost_what_the_slowest_of_all_ranks_takes_longer():
    work, jitter = replace(SIMPLE, units=16, ranks_per_unit=8), 0.02
    found = Training(work, Conditions(jitter=jitter), steps=400, seed=1).run()
    draws = np.exp(jitter * np.random.default_rng(2).standard_normal((20_000, 128))).max(axis=1)
    assert found.stragglers / work.compute_s == pytest.approx(draws.mean() - 1, rel=0.03)
    assert found.stragglers / work.compute_s == pytest.approx(jitter * math.sqrt(2 * math.log(128)), rel=0.25)


def test_a_storage_of_half_the_rate_that_is_needed_doubles_a_step():
    needed = SIMPLE.units * SIMPLE.batch_bytes / SIMPLE.compute_s
    enough, half = (
        Training(SIMPLE, Conditions(storage_bytes_per_s=rate * needed), steps=50, seed=0).run() for rate in (1.01, 0.5)
    )
    assert (enough.step, enough.data) == (pytest.approx(3.0, rel=0.01), pytest.approx(0, abs=0.01))
    assert (half.step, half.data) == (pytest.approx(6.0, rel=0.01), pytest.approx(3.0, rel=0.05))


def test_ranks_share_the_cores_of_a_machine():
    for cores, seconds in ((8, 3.0), (4, 3.0), (2, 6.0), (1, 12.0)):
        assert Training(SIMPLE, Conditions(), steps=3, seed=0, cores=cores).run().step == pytest.approx(seconds)


def test_a_save_holds_each_step_that_it_follows_and_is_written_beside_the_images_that_are_read():
    saves = replace(SIMPLE, checkpoint_steps=5, checkpoint_stall_s=0.5)
    found = Training(saves, Conditions(), steps=50, seed=0).run()
    assert (found.checkpoint, found.step) == (pytest.approx(0.1), pytest.approx(3.1))
    needed = SIMPLE.units * SIMPLE.batch_bytes / SIMPLE.compute_s
    writes = replace(saves, checkpoint_stall_s=0.0, checkpoint_bytes=5 * SIMPLE.batch_bytes)
    busy = Training(writes, Conditions(storage_bytes_per_s=needed), steps=100, seed=0).run()
    assert busy.step == pytest.approx(6.0, rel=0.05)  # as much is written as is read


@pytest.mark.parametrize("ranks", [512, 4096])
def test_failures_cost_what_youngs_formula_says_and_its_interval_is_the_best(ranks):
    young = failures_of(ranks, 0.5)
    fixed = {"mtbf_s": young.mtbf_s, "write_s": 0.0, "restart_s": RESTART_S, "failures": 4000, "seed": 3}
    lost = {
        factor: share_lost_to_failures(interval_s=factor * young.interval_s, stall_s=0.5, **fixed)
        for factor in (0.25, 1, 4)
    }
    assert lost[1] == pytest.approx(young.lost, rel=0.05)
    assert lost[1] < min(lost[0.25], lost[4])


def test_a_seed_gives_the_same_to_the_digit_and_another_gives_another():
    conditions = Conditions(jitter=0.05, spread=0.02, storage_bytes_per_s=150.0)
    first, again, other = (Training(SIMPLE, conditions, steps=20, seed=seed).run() for seed in (7, 7, 8))
    assert first == again != other


@pytest.mark.slow
def test_the_page_has_what_is_simulated():
    page = (ROOT / "docs" / "thousand_nodes.md").read_text(encoding="utf-8")
    site, work = (
        cluster_sim.CLUSTERS["h100-ib"],
        cluster_sim.workload_of(cluster_sim.RECIPE, cluster_sim.MODELS["ViT-L"]),
    )
    for ranks in (8, 64):
        setting = cluster_sim.setting_for(work, site, ranks, cluster_sim.IMAGES_PER_GPU)
        found = cluster_sim.simulate(work, setting, site, seed=0)
        assert cluster_sim.table([found])[1] in page
