"""The benchmarks at their smallest size, as a user runs them; and bench/gpu.sh without a GPU, all stages through."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


def bench(name: str, *arguments: str, folder: Path) -> dict:
    """Run `python bench/NAME.py ARGUMENTS --json FILE`; what it has written."""
    done = subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), *arguments, "--json", str(folder / "out.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads((folder / "out.json").read_text())


@pytest.fixture
def module(monkeypatch):
    """Import a file of bench/ as it is imported there."""
    monkeypatch.syspath_prepend(str(BENCH))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, loaded)
        spec.loader.exec_module(loaded)
        return loaded

    return load


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_engine_plain_loop_and_peer_train_alike(precision, tmp_path):
    found = bench(
        "engine",
        *("--sizes", "tiny", "--rounds", "1", "--precision", precision, "--micro-batches", "4"),
        *("--accumulation", "2", "--zero-stages", "3", "2"),
        folder=tmp_path,
    )
    (setting,) = found["settings"]
    ways = setting["ways"]
    assert set(ways) == {"plain loop", "engine, ZeRO 3", "engine, ZeRO 2", "Hugging Face"}
    assert all(way["state"] == "measured" for way in ways.values())
    losses = {name: way["losses"] for name, way in ways.items()}
    expected = losses["plain loop"]
    assert expected[-1] < expected[0]
    assert losses["engine, ZeRO 2"] == pytest.approx(expected, abs=1e-5 if precision == "fp32" else 1e-3)
    if precision == "fp32":
        assert losses["engine, ZeRO 3"] == pytest.approx(expected, abs=1e-5)
        assert losses["Hugging Face"] == pytest.approx(expected, abs=1e-5)
    else:  # fp32 weights under autocast: the first loss alone is that of the same weights, but for rounding
        assert losses["Hugging Face"][0] == pytest.approx(expected[0], abs=1e-3)
    for way in ways.values():
        assert way["images_per_s"] == pytest.approx(8 / way["step_s"]["median"])
        assert way["tflops_per_s"] == pytest.approx(way["images_per_s"] * way["gflops_per_image"] / 1e3)
        assert way["share_of_matrix_product"] > 0
    for name, ratio in setting["over_plain_loop"].items():
        assert name != "plain loop"
        assert ratio["median"] > 0
        assert ratio["cpu_time"]["median"] > 0


def test_a_lap_that_runs_out_of_memory_is_said_and_the_next_goes_on(module):
    engine = module("engine")
    setting = engine.Setting("tiny", 2, 1, "fp32", False, "none")

    def too_large(*_):
        raise torch.OutOfMemoryError("64 GiB more")

    def broken(*_):
        raise ValueError("no such\nkernel")

    device = torch.device("cpu")
    assert engine.lap(setting, engine.Way("a", too_large, "fast"), device) == {"state": "out of memory"}
    assert engine.lap(setting, engine.Way("b", broken, "fast"), device) == {
        "state": "failed: ValueError: no such kernel"
    }
    assert engine.lap(setting, engine.Way("c", engine.plain_loop, "fast"), device)["state"] == "measured"


def test_mask_tokens_counts_the_papers_arithmetic(module):
    sizes, mask_tokens = module("sizes"), module("mask_tokens")
    assert mask_tokens.kinds_of("large") == [(True, 8), (True, 1), (False, 8), (False, 1)]
    slow, fast = (sizes.training_flops_per_image(sizes.SIZES["large"], way) for way in ("encoder_mask_tokens", "fast"))
    assert slow / fast == pytest.approx(3.24, abs=0.02)  # docs/performance.md: 133.75 beside 41.24 GFLOPs


def test_a_profile_knows_kinds_of_kernels_and_waits_of_the_host(module):
    profile = module("profile_step")
    for name, kind in {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTT": "matrix products",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>, FusedAdamMathFunctor<float>>": "optimiser",
        "Memcpy DtoH (Device -> Pinned)": "copies",
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL": "communication",
        "triton_per_fused_native_layer_norm_0": "elementwise, norms",
        "aten::addmm": "matrix products",
        "cudaLaunchKernel": "other",
    }.items():
        assert profile.kind_of(name) == kind, name
    assert profile.covered([(0, 2), (1, 3), (5, 6)]) == 4

    text = "import warnings\ndef step():\n    warnings.warn('called a synchronizing CUDA operation')\n"
    scope: dict = {}
    exec(compile(text, "/site-packages/deepspeed/runtime/engine.py", "exec"), scope)
    states = []
    waits = profile.host_waits(lambda: [scope["step"](), warnings.warn("something else", stacklevel=1)], states.append)
    assert waits == [{"where": "deepspeed/runtime/engine.py:3 step", "per_step": 1.0}]
    assert states == [True, False]


@pytest.fixture
def dense(module, tmp_path):
    """bench/dense.py, its options and scenes at their smallest."""
    loaded = module("dense")
    options = argparse.Namespace(
        vit=loaded.NAMED["tiny"], image_size=64, channels=16, micro_batch=2, precision="fp32", threads=1
    )
    return loaded, options, loaded.Scenes(tmp_path / "scenes", 8, 96, "polygons")


def test_the_peer_of_detection_is_the_same_model_and_sees_the_same_images(dense):
    dense, options, scenes = dense
    images, objects = dense.batch_of(scenes, options)
    made = dense.make_trainees(images, objects, options, torch.device("cpu"))
    model, peer = made["ours"]().model.eval(), made["torchvision"]().model.eval()
    peer.rpn.anchor_generator = (
        model.rpn.anchor_generator
    )  # theirs are rounded, and theirs are pooled half a cell aside
    peer.roi_heads.box_roi_pool = model.roi_heads.box_roi_pool
    peer.roi_heads.mask_roi_pool = model.roi_heads.mask_roi_pool
    with torch.no_grad():
        found, expected = model.detect(images, 2 * [(64, 64)]), peer(list(images))
    for one, other in zip(found, expected, strict=True):
        assert len(one["boxes"])
        torch.testing.assert_close(one["boxes"], other["boxes"], atol=1e-3, rtol=1e-4)
        assert torch.equal(one["labels"], other["labels"])

    ways = sys.modules[type(scenes).__module__]  # bench/annotated_images.py
    with scenes.loader(64, dense.BATCH) as loader:
        (batch,) = loader
    plan = ways.plan_batch(
        scenes.index, ways.augmentation(ways.KIND), seed=0, number=0, global_batch=dense.BATCH, image_size=64
    )
    for kind in (ways.CocoDetection, ways.TensorImages):
        dataset = ways.dataset_of(scenes, kind)
        overlaps = []
        for row, placed in enumerate(batch.annotated):
            image, target = ways.moved(dataset, plan, row, 64)
            assert (image - batch.images[row]).abs().mean() < 0.15  # cubic here, bilinear there
            mine, theirs = placed.masks.any(0), target["masks"].numpy().any(0)
            overlaps.append([(mine & theirs).sum(), (mine | theirs).sum()])
        both, either = zip(*overlaps, strict=True)
        assert sum(both) / sum(either) > 0.8  # pixels at the edges: polygons are rasterised here after the cut


@pytest.mark.slow
def test_detection_is_measured_beside_torchvisions(tmp_path):
    found = bench(
        "dense",
        *("--size", "tiny", "--channels", "16", "--image-size", "64", "--rounds", "1"),
        *("--images", "8", "--side", "96", "--jitter-size", "128"),
        folder=tmp_path,
    )
    step = found["step"]
    assert step["first_loss"]["ours"] == pytest.approx(step["first_loss"]["torchvision"], rel=0.1)
    assert step["times_as_fast"]["median"] > 0
    for name in ("ours", "torchvision"):
        assert step[name]["images_per_s"] == pytest.approx(2 / step[name]["step_s"])
        assert step[name]["peak_gib"] > 0
    assert len(found["images"]) == 4
    assert all(0 < way["cpu_ms_lowest"] <= way["cpu_ms"] for way in found["images"].values())


@pytest.mark.slow
def test_gpu_script_goes_through_all_stages_and_on_after_a_part_that_fails(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *bench/attention.py*) echo broken; exit 3 ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    parts = {}
    for stage, code in {"truth": 1, "speed": 0, "profile": 0, "data": 0}.items():
        done = subprocess.run(
            [str(BENCH / "gpu.sh"), stage, str(tmp_path / "nothing carried")],
            env={**os.environ, "PYTHON": str(python), "OUT": str(tmp_path / "out"), "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, (done.stdout + done.stderr)[-4000:]
        summary = json.loads((tmp_path / "out" / f"{stage}.json").read_text())
        parts |= {part["part"]: (part["state"], part["reason"]) for part in summary["parts"]}
        assert "no GPU" in done.stdout
        assert len(list((tmp_path / "out").glob(f"{stage}.*"))) == 2
    assert parts.pop("attention") == ("failed", "exit code 3")
    assert parts.pop("CIFAR-10")[0] == "skipped"
    skipped = {name for name, (state, reason) in parts.items() if (state, reason) == ("skipped", "no GPU")}
    assert skipped == {"nvidia-smi", "rates of planning", *(name for name in parts if name.startswith("tests of"))}
    assert {state for name, (state, _) in parts.items() if name not in skipped} == {"done"}
    assert len(parts) > 10
    written = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")}
    (tokens,) = written["mask_tokens"]["results"]
    assert {row["encoder_mask_tokens"] for row in tokens["rows"]} == {True, False}
    assert all(row["laps"][0]["state"] == "measured" for row in tokens["rows"])
    assert sum(written["profile_step"]["ms_per_step"].values()) == pytest.approx(
        written["profile_step"]["wall_ms_per_step"], rel=0.5
    )
    assert written["rates"]
    assert len(written["methods"]["methods"]) == 5
    assert all(row["images_per_s"] > 0 for row in written["methods"]["methods"])
    for stage in ("engine-huge", "engine-large"):
        (setting,) = written[stage]["settings"]
        assert all(way["state"] == "measured" for way in setting["ways"].values()), stage


def test_gpu_script_refuses_an_unknown_stage():
    done = subprocess.run([str(BENCH / "gpu.sh"), "everything"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "truth, speed, profile or data" in done.stderr
