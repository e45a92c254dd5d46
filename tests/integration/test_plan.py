"""`mae-scale plan` as users call it."""

import json
import textwrap
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def test_a_plan_says_what_fits_what_to_take_and_how_it_scales(call, tmp_path):
    file = tmp_path / "plan.json"
    code, out, error = call(
        "plan", "pretrain/vit_huge_1600ep", "--nodes", "8", "--json", file, "--out", tmp_path / "plan.png"
    )
    with Image.open(tmp_path / "plan.png") as figure:
        assert figure.width > 800
    assert (code, error) == (0, "")
    found = json.loads(file.read_text())
    assert found["fits"]
    assert f"fits, {found['memory_gib']:.1f} of 74.5 GiB" in out
    assert (
        f"{found['images_per_second']:,.0f} images/s; {found['hours']:,.1f} h, {found['gpu_hours']:,.0f} GPU hours"
        in out
    )
    assert found["images_per_second"] == pytest.approx(4096 / found["step_time_s"])
    assert found["hours"] == pytest.approx(1600 * (1_281_167 // 4096) * found["step_time_s"] / 3600)
    assert sum(found["memory_parts_gib"].values()) == pytest.approx(found["memory_gib"])
    assert sum(found["step_parts_s"].values()) == pytest.approx(found["step_time_s"])
    assert [row["ranks"] for row in found["weak_scaling"]] == [2**n for n in range(13)]
    assert "measured: nothing" in out


def test_the_recommended_overrides_can_be_pasted(call, tmp_path):
    base = ("plan", "finetune/vit_huge_448", "--nodes", "4", "--json", tmp_path / "plan.json")
    code, out, _ = call(*base)
    assert code == 0
    recommended = next(line for line in out.splitlines() if line.startswith("recommended"))
    first = json.loads((tmp_path / "plan.json").read_text())["recommended"]
    code, out, _ = call(*base, *recommended.split()[1:])
    assert code == 0
    again = json.loads((tmp_path / "plan.json").read_text())
    assert {key: again[key] for key in first} == first
    assert "recommended   the same" in out


def test_a_file_of_measured_rates_is_taken_and_named(call, tmp_path):
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({"product_tflops": 600.0}))
    code, out, _ = call("plan", "pretrain/vit_large_800ep", "--calibrate", rates)
    assert code == 0
    assert "measured: product_tflops; all other rates are of data sheets" in out


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cpu", ", by rates measured on cpu"),
        ("NVIDIA H100 80GB HBM3", ""),
        ("NVIDIA A40", ", by rates measured on NVIDIA A40"),
    ],
)
def test_rates_of_another_device_than_the_one_planned_for_are_named_at_the_top(device, said, call, tmp_path):
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({"product_tflops": 600.0, "device": device}))
    code, out, _ = call("plan", "pretrain/vit_large_800ep", "--calibrate", rates)
    assert code == 0
    assert out.splitlines()[0].endswith(f"(80 GB, nvlink4){said}")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--measure", "rates.json"], 2, "--measure plans nothing, and found the recipe pretrain/vit_large_800ep"),
        (["--nproc", "4"], 2, "--nproc 4 is for --measure; a plan's GPUs are --nodes and --gpus-per-node"),
        (["--gpu", "h1000"], 2, "GPU h1000 is not known; did you mean h100?"),
        (["--link", "infini"], 2, "link infini is not known; did you mean infiniband-"),
        (["--gpu", "v100"], 2, "v100 has no units for bf16; use engine.precision=fp16, or another GPU"),
        (["--calibrate", "missing.json"], 2, "--calibrate missing.json cannot be read: No such file or directory"),
        (["--gpus-per-node", "7"], 2, "data.global_batch=4096 is not divisible by 7 ranks"),
        (["engine.backend=fairscale"], 2, "engine.backend=fairscale cannot be planned"),
        (["--out", "plan.pdf"], 2, "--out plan.pdf: expected a name that ends in .png"),
        (["model.width=6"], 2, "width 6 is not a multiple of"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, code, message, call):
    found, out, error = call("plan", "pretrain/vit_large_800ep", *words)
    assert found == code
    assert message in error
    assert error.count("\n") == 1
    assert out == ""


def test_a_model_that_fits_nowhere_ends_with_1_and_says_what_would_have_to_change(call):
    sizes = ("model.width=16384", "model.depth=64", "model.heads=128", "engine.precision=fp16")
    code, out, _ = call("plan", "pretrain/vit_huge_800ep", *sizes, "--gpu", "t4")
    assert code == 1
    assert "nothing fits; what would have to change, in order of cost:" in out
    assert "--nodes" in out


@pytest.mark.parametrize("name", ["README.md", "docs/planning.md"])
def test_the_page_shows_what_the_command_prints(name, call):
    page = (ROOT / name).read_text(encoding="utf-8")
    command = next(line for line in page.splitlines() if line.startswith("    mae-scale plan ")).split()
    code, out, _ = call(*command[1:])
    assert code == 0
    assert textwrap.indent("\n".join(out.splitlines()[:5]), "    ", lambda line: bool(line.strip())) in page


def test_the_page_on_slurm_shows_what_submit_prints(call, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    job = ("pretrain/vit_huge_1600ep", "data.root=/d", "--nodes", 16, "--gpu", "h100")
    code, out, error = call("submit", *job, "--out", "runs", "--dry-run")
    assert code == 0, error
    assert textwrap.indent("\n".join(out.splitlines()[:4]), "    ") in page
