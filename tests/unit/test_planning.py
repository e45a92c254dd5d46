"""The planner's rules: collectives, rates, what is recommended, how throughput scales; published runs beside it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe
from mae_scale.packaged import packaged
from mae_scale.planning.collectives import Cluster, all_gather_s, all_reduce_s
from mae_scale.planning.failures import GPU_MTBF_S, RESTART_S, failures_of
from mae_scale.planning.flops import mae_forward_flops, training_flops
from mae_scale.planning.hardware import gpu_named, gpus, link_named, links
from mae_scale.planning.memory import BUCKET, Setting
from mae_scale.planning.rates import Rates, calibrated, rates_of
from mae_scale.planning.search import scaling
from mae_scale.planning.step_time import step_time
from mae_scale.tasks.plan import asked_of, make_plan
from mae_scale.tasks.plan_text import overrides_of
from mae_scale.tasks.registry import task_of


def rates(gpu: str = "h100", link: str = "infiniband-8x400", precision: str = "bf16") -> Rates:
    found = gpu_named(gpu)
    return rates_of(found, link_named(link), link_named(found.link), precision)


def workload(recipe: str, *overrides: str):
    return task_of(load_recipe(recipe, list(overrides)), Path()).workload(1000)


def plan(recipe: str, *overrides: str, nodes: int = 1, gpus_per_node: int = 8, gpu: str = "h100", **more):
    link = more.pop("link", "infiniband-8x400")
    loaded = load_recipe(recipe, list(overrides))
    return make_plan(asked_of(recipe, loaded, nodes=nodes, gpus_per_node=gpus_per_node, gpu=gpu, link=link, **more))


def test_a_ring_sends_the_bytes_of_the_formula():
    free = replace(rates(), node_link_latency_s=0, link_latency_s=0)
    size, node = 1e9, Cluster(1, 8)
    assert all_reduce_s(size, node, free) == pytest.approx(2 * size * 7 / 8 / free.node_link_bytes_per_s)
    assert all_gather_s(size, node, free) == pytest.approx(all_reduce_s(size, node, free) / 2)
    assert all_reduce_s(size, Cluster(1, 1), free) == 0
    slow = replace(free, link_bytes_per_s=free.node_link_bytes_per_s / 10)
    assert all_reduce_s(size, Cluster(4, 8), slow) == pytest.approx(2 * size * 31 / 32 / slow.link_bytes_per_s)


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        ([], {}),
        (["model.target=pca"], {"target_dim": 96}),
        (
            ["model.encoder_mask_tokens=true", "model.decoder_depth=1"],
            {"way": "encoder_mask_tokens", "decoder_depth": 1},
        ),
    ],
)
def test_flops_of_mae_are_those_of_the_formula_for_its_target_and_decoder(overrides, asked):
    found = task_of(load_recipe("pretrain/vit_large_800ep", overrides), Path()).training_flops()
    assert found == training_flops(mae_forward_flops("vit_large_patch16", **asked))


def test_flops_are_those_that_runs_are_measured_by():
    for name in ("scratch/vit_large", "partial/vit_large"):
        recipe = load_recipe(name)
        task = task_of(recipe, Path())
        work = task.workload(1000)
        assert work.forward_flops + work.backward_flops == pytest.approx(task.training_flops(), rel=1e-3)


def test_checkpointing_costs_a_forward_pass_of_products():
    work, rate = workload("pretrain/vit_large_800ep"), rates()
    plain, again = (
        step_time(work, Setting(1, 1, "bf16", 256, checkpointing=policy), Cluster(1, 1), rate)
        for policy in ("none", "all")
    )
    assert again.products == pytest.approx(plain.products * 4 / 3, rel=0.02)
    assert again.optimizer == plain.optimizer


def test_zero_2_reduces_every_micro_batch_and_zero_1_once():
    work, rate = workload("pretrain/vit_huge_800ep"), rates(link="ethernet-25")
    of = {
        (stage, passes): step_time(work, Setting(64, stage, "bf16", 8, passes), Cluster(8, 8), rate).communication
        for stage in (1, 2)
        for passes in (1, 8)
    }
    assert of[1, 1] == of[1, 8]
    assert of[2, 8] > 3 * of[2, 1]


def test_a_file_of_ones_own_decides_stage_and_sizes(tmp_path):
    config = json.loads((packaged("ds_configs") / "zero2.json").read_text())
    packaged_sizes = plan("pretrain/vit_huge_800ep", "engine.zero_stage=2")
    del config["zero_optimization"]["reduce_bucket_size"]
    file = tmp_path / "own.json"
    for given, bucket in (({}, 500_000_000), ({"reduce_bucket_size": 50_000_000}, 50_000_000)):
        file.write_text(json.dumps({**config, "zero_optimization": config["zero_optimization"] | given}))
        own = plan("pretrain/vit_huge_800ep", f"engine.config={file}", "engine.zero_stage=1")
        assert own.as_is.memory.buckets == 2 * 2 * bucket
        assert {one.setting.zero_stage for one in own.choices} == {2}
    assert packaged_sizes.as_is.memory.buckets == 2 * 2 * BUCKET
    assert own.as_is.time.communication < packaged_sizes.as_is.time.communication


def test_only_micro_batches_that_the_task_trains_with_are_chosen():
    weights = "classifier.weights=unused"
    found = plan(
        "finetune/vit_huge_448",
        weights,
        "model.width=8192",
        "model.heads=64",
        "engine.precision=fp16",
        nodes=16,
        gpu="t4",
    )
    assert min(one.setting.micro_batch for one in found.choices) == 2  # mixup mixes neighbours
    assert {one.setting.micro_batch for one in plan("probe/vit_large", weights).choices} == {2048}  # batch norm
    assert {one.setting.micro_batch for one in plan("pretrain/moco_v3_vit_base").choices} == {512}  # negatives


def test_what_zero_3_may_not_compile_other_stages_do():
    found = plan("pretrain/vit_huge_800ep", "engine.zero_stage=3")
    assert {one.setting.zero_stage: one.setting.compiled for one in found.choices} == {1: True, 2: True, 3: False}


@pytest.mark.parametrize("name", ["pretrain/vit_huge_1600ep", "finetune/vit_huge_448", "probe/vit_large"])
def test_what_is_recommended_fits_and_no_candidate_is_much_faster(name):
    more = ["classifier.weights=unused"] if "pretrain" not in name else []
    found = plan(name, *more, nodes=4)
    assert found.best is not None
    assert found.best.fits
    assert all(found.best.time.total < 1.02 * one.time.total for one in found.choices if one.fits)
    again = plan(name, *more, *overrides_of(found, found.best).split(), nodes=4)
    assert again.as_is.time == found.best.time
    assert again.as_is.memory == found.best.memory


def test_a_model_that_fits_nowhere_is_told_what_would_have_to_change():
    sizes = ["model.width=16384", "model.depth=64", "model.heads=128", "engine.precision=fp16"]
    found = plan("pretrain/vit_huge_800ep", *sizes, gpu="t4")
    assert found.best is None
    assert found.larger[-1].startswith("a smaller model")
    assert found.as_json()["recommended"] is None
    assert not found.as_json()["fits"]


def test_throughput_grows_with_gpus_and_strong_scaling_ends_at_one_image():
    work, setting = workload("pretrain/vit_large_800ep"), Setting(64, 2, "bf16", 64)
    strong = scaling(work, setting, rates(), 80e9, gpus_per_node=8, up_to=4096, global_batch=256)
    assert [scale.ranks for scale in strong] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert strong[-1].efficiency < 0.5 < strong[3].efficiency
    weak = scaling(work, setting, rates(link="ethernet-10"), 80e9, gpus_per_node=8, up_to=64, global_batch=None)
    by_ranks = {scale.ranks: scale.efficiency for scale in weak}
    assert by_ranks[16] < 0.5 * by_ranks[8]


def test_what_must_train_a_ranks_share_at_once_is_not_planned_where_that_does_not_fit():
    """MoCo v3's negatives; nor is it advised where nothing fits."""
    recipe = "pretrain/moco_v3_vit_large"
    found = plan(recipe, gpu="a100-40gb", nodes=8)
    engine = [*overrides_of(found, found.best).split(), "engine.micro_batch=null"]
    for scale in found.strong:
        nodes, each = max(1, scale.ranks // 8), min(scale.ranks, 8)
        assert plan(recipe, *engine, gpu="a100-40gb", nodes=nodes, gpus_per_node=each).as_is.fits, scale
    larger = [recipe, "model.image_size=448"]
    (advice,) = [line for line in plan(*larger, gpu="a30").larger if "--nodes" in line]
    nodes = int(advice.split()[1].rstrip(":"))
    assert plan(*larger, gpu="a30", nodes=nodes).best is not None
    assert plan(*larger, gpu="a30", nodes=nodes // 2).best is None


@pytest.mark.parametrize(
    ("recipe", "gpu", "nodes", "micro_batch", "images_per_second", "factor"),
    [
        # Authors' release: 800 epochs of ViT-L in 42 h on 64 V100, fp16, its own loop with Pillow loading.
        ("pretrain/vit_large_800ep", "v100", 8, 64, 800 * 1_281_167 / (42 * 3600), 4.5),
        # MAE ViT-B, 128 images a GPU, 8 A6000: 0.4084 s per step.
        ("pretrain/vit_base_800ep", "a6000", 1, 128, 8 * 128 / 0.4084, 3.5),
    ],
)
def test_published_runs_are_slower_than_planned_by_no_more_than_the_stated_factor(
    recipe, gpu, nodes, micro_batch, images_per_second, factor
):
    precision = "fp16" if gpu == "v100" else "bf16"
    batch = 8 * nodes * micro_batch
    found = plan(recipe, f"engine.precision={precision}", f"data.global_batch={batch}", gpu=gpu, nodes=nodes)
    assert 1 < found.as_is.images_per_second / images_per_second < factor


def test_measured_rates_replace_assumed_ones_and_are_named():
    assumed = rates()
    given = {"product_tflops": {"64": 100, "1024": 700}, "elementwise_gb_s": 2500, "other": 1}
    found = calibrated(assumed, given, "rates.json")
    assert [found.products.at(width) for width in (32, 64, 1024, 4096)] == [100e12, 100e12, 700e12, 700e12]
    assert found.products.at(256) == pytest.approx((100e12 * 700e12) ** 0.5)
    assert found.elementwise_bytes_per_s == 2500e9
    assert found.link_bytes_per_s == assumed.link_bytes_per_s
    assert found.measured == {"product_tflops", "elementwise_gb_s"}
    assert calibrated(assumed, {"product_tflops": 1, "device_type": "cpu"}, "rates.json").processors == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"product_tflops": -1}, "product_tflops is -1; expected a positive number"),
        ({"product_tflops": {"64": "fast"}}, "product_tflops is {'64': 'fast'}; expected a positive number"),
        ({"product_tflops": {}}, "product_tflops is {}; expected a positive number"),
        ({"elementwise_gb_s": [1]}, "elementwise_gb_s is [1]; expected a positive number"),
        ({"tflops": 1}, "has none of product_tflops, attention_tflops"),
    ],
)
def test_a_file_that_holds_no_rates_is_refused(given, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        calibrated(rates(), given, "rates.json")


def test_every_gpu_has_a_link_and_a_source():
    for gpu in gpus().values():
        assert gpu.link in links()
        assert gpu.source
        assert gpu.tflops["fp32"] < gpu.tflops["fp16"]
    assert {"v100", "a100", "a100-40gb", "h100", "h100-pcie", "h200", "b200", "l40s", "rtx-4090"} <= gpus().keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "h1000"}, "GPU h1000 is not known; did you mean h100?"),
        ({"link": "infiniband"}, "link infiniband is not known; did you mean infiniband-"),
        ({"gpu": "v100"}, "v100 has no units for bf16; use engine.precision=fp16"),
        ({"gpus_per_node": 7}, "not divisible by 7 ranks"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        plan("pretrain/vit_large_800ep", **arguments)


def lost_in_simulation(interval_s: float, stall_s: float, mtbf_s: float, *, seed: int) -> float:
    """Share of the time that is lost by a run which saves after each interval of work and fails at random instants."""
    random = np.random.default_rng(seed)
    work = time = 0.0
    next_failure = random.exponential(mtbf_s)
    while work < 2000 * mtbf_s:
        if time + interval_s + stall_s <= next_failure:
            time, work = time + interval_s + stall_s, work + interval_s
        else:
            time = next_failure + RESTART_S
            next_failure = time + random.exponential(mtbf_s)
    return 1 - work / time


@pytest.mark.parametrize("ranks", [512, 16384])
def test_the_share_of_time_that_failures_cost_is_that_of_a_simulation(ranks):
    found = failures_of(ranks, 10.0)
    assert found.mtbf_s == GPU_MTBF_S / ranks
    simulated = lost_in_simulation(found.interval_s, 10.0, found.mtbf_s, seed=0)
    assert found.lost == pytest.approx(simulated, rel=0.1)
    for other in (found.interval_s / 3, found.interval_s * 3):
        assert simulated < lost_in_simulation(other, 10.0, found.mtbf_s, seed=0)
