"""The plan that `mae-scale submit` prints, and its refusal of what cannot fit; without a Slurm."""

import json
import shutil

import pytest

from mae_scale.packaged import packaged
from mae_scale.planning.hardware import gpu_in, gpus

HUGE = "pretrain/vit_huge_1600ep"
CHAIN = [HUGE, "finetune/vit_huge_224", "finetune/vit_huge_448"]
T4 = ("--gpu", "t4", "engine.precision=fp16")


@pytest.fixture
def submit(call, monkeypatch, tmp_path):
    """Call `mae-scale submit ... --dry-run` in an empty folder, where no Slurm is."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("bash", "dirname"):
        (commands / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(commands))
    for name in ("MAE_SCALE_GPU", "MAE_SCALE_LINK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*words) -> tuple[int, str, str]:
        return call("submit", *words, "--out", "runs", "data.root=/d", "data.val_root=/v", "--dry-run")

    return run


def plans(out: str) -> str:
    """What is printed before the first script."""
    return out.partition("# /")[0]


def test_each_job_has_the_figures_of_its_plan(submit, call, tmp_path):
    code, out, error = submit(*CHAIN, "--nodes", 16, "--gpu", "h100", "--link", "infiniband-400")
    assert code == 0, error
    assert plans(out).count("plan for ") == 3
    for name in CHAIN:
        asked = ("--nodes", 16, "--gpu", "h100", "--link", "infiniband-400", "--json", tmp_path / "plan.json")
        assert call("plan", name, *asked)[0] == 0
        found = json.loads((tmp_path / "plan.json").read_text())
        own = plans(out).partition(f"plan for {name} on 16 x 8 h100\n")[2].splitlines()[:3]
        assert own[0].startswith(f"  memory     fits, {found['memory_gib']:.1f} of 74.5 GiB: ZeRO 2, bf16, micro-batch")
        ms = 1000 * found["step_time_s"]
        assert own[1] == f"  hours      {found['hours']:,.1f} for ImageNet-1K's 1,281,167 images, {ms:,.1f} ms per step"
        assert own[2] == f"  GPU hours  {found['gpu_hours']:,.0f}"


def test_hours_are_of_the_images_that_the_recipe_takes(submit):
    """A tenth of them have a tenth of the steps: 31 and 312 per epoch."""
    hours = []
    for fraction, images in (("0.1", "128,116"), ("null", "1,281,167")):
        _, out, _ = submit(HUGE, "--nodes", 1, "--gpu", "h100", f"data.fraction={fraction}")
        (line,) = [line for line in out.splitlines() if line.startswith("  hours ")]
        assert f" for ImageNet-1K's {images} images, " in line
        hours.append(float(line.split()[1]))
    assert hours[0] / hours[1] == pytest.approx(31 / 312, rel=0.02)


def test_a_setting_that_is_faster_is_named_and_then_is_not(submit, tmp_path):
    weights = f"classifier.weights={tmp_path}"
    _, out, _ = submit("finetune/vit_huge_448", "--nodes", 4, "--gpu", "h100", weights)
    (line,) = [line for line in out.splitlines() if line.startswith("  faster ")]
    overrides = line.partition(": ")[2].split()
    again = submit("finetune/vit_huge_448", *overrides, "--nodes", 4, "--gpu", "h100", weights)
    assert again[0] == 0
    assert "  faster " not in again[1]


def test_what_the_recipe_has_against_a_setting_is_taken_back(submit, tmp_path):
    given = ["engine.zero_stage=3", "engine.offload=true", "--nodes", 4, "--gpu", "h100"]
    _, out, _ = submit("scratch/vit_large", *given)
    (line,) = [line for line in out.splitlines() if line.startswith("  faster ")]
    overrides = line.partition(": ")[2].split()
    assert "engine.offload=false" in overrides
    code, out, error = submit("scratch/vit_large", *given, *overrides)
    assert code == 0, error
    assert "  faster " not in out


def test_what_does_not_fit_is_refused_with_what_does_unless_forced(submit, tmp_path):
    code, out, error = submit(HUGE, "--nodes", 1, *T4)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert f"{HUGE} on 1 x 8 t4 does not fit, " in error
    assert "of 14.9 GiB" in error
    assert "; --force sends it all the same" in error
    overrides = error.partition("; use ")[2].partition(";")[0].split()
    code, out, error = submit(HUGE, "--nodes", 1, *T4, *overrides)
    assert code == 0, error
    assert "  memory     fits, " in plans(out)
    code, out, error = submit(HUGE, "--nodes", 1, *T4, "--force")
    assert code == 0, error
    assert "  memory     does not fit, " in plans(out)
    assert "it is sent all the same (--force)" in plans(out)
    assert not (tmp_path / "runs").exists()


def test_where_nothing_fits_the_cheapest_change_is_named(submit):
    sizes = ("model.width=16384", "model.depth=64", "model.heads=128")
    code, _, error = submit(HUGE, *sizes, "--nodes", 1, *T4)
    assert (code, error.count("\n")) == (2, 1)
    assert "; nothing does: try --nodes " in error


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "no plan: the kind of GPU is not known; add --gpu h100, or set MAE_SCALE_GPU in slurm/environment.sh"),
        (
            ["--gpu", "v100"],
            f"no plan for {HUGE}: v100 has no units for bf16; use engine.precision=fp16, or another GPU",
        ),
        (["--gpu", "h100", "engine.backend=fairscale"], f"no plan for {HUGE}: engine.backend=fairscale cannot be"),
        (["--gpu", "h100", "--gpus-per-node", 4, "--ntasks-per-node", 8], f"no plan for {HUGE}: 8 ranks share 4 GPUs"),
    ],
)
def test_what_cannot_be_planned_is_sent_without_a_plan(submit, words, line):
    code, out, error = submit(HUGE, "--nodes", 16, *words, *["engine.zero_stage=1"] * ("engine.backend" in str(words)))
    assert code == 0, error
    assert plans(out).startswith(line)
    assert plans(out).count("\n") == 1
    assert "run_job pretrain" in out


def test_nodes_without_gpus_have_no_plan(submit):
    code, out, error = submit("demo", "--nodes", 1, "--gpus-per-node", 0, "--ntasks-per-node", 2, "--gpu", "h100")
    assert code == 0, error
    assert plans(out) == ""


@pytest.mark.parametrize("option", [("--gpu", "h10"), ("--link", "infiniband-40")])
def test_an_unknown_name_is_refused_with_the_nearest(submit, option):
    code, out, error = submit(HUGE, "--nodes", 16, *option)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert f"{option[1]} is not known; did you mean {option[1]}0?" in error


def test_the_gpu_is_the_sites_else_the_templates(submit, tmp_path, monkeypatch):
    shutil.copytree(packaged("slurm"), tmp_path / "slurm")
    template, site = tmp_path / "slurm" / "pretrain.sbatch", tmp_path / "slurm" / "environment.sh"
    text = template.read_text()
    template.write_text(text.replace("--gpus-per-node=8", "--gres=gpu:nvidia_a100-sxm4-40gb:8"))
    assert f"plan for {HUGE} on 16 x 8 a100-40gb\n" in submit(HUGE, "--nodes", 16)[1]
    template.write_text(text.replace("--gpus-per-node=8", "--gpus-per-node=rainbow:8"))
    assert "no plan: GPU rainbow of the template is not known; add --gpu h100" in submit(HUGE, "--nodes", 16)[1]
    site.write_text(site.read_text().replace("${MAE_SCALE_GPU:=}", "${MAE_SCALE_GPU:=h200}"))
    assert f"plan for {HUGE} on 16 x 8 h200\n" in submit(HUGE, "--nodes", 16)[1]
    monkeypatch.setenv("MAE_SCALE_GPU", "b200")
    assert f"plan for {HUGE} on 16 x 8 b200\n" in submit(HUGE, "--nodes", 16)[1]
    assert f"plan for {HUGE} on 16 x 8 h100\n" in submit(HUGE, "--nodes", 16, "--gpu", "h100")[1]


def test_a_gpu_is_known_by_the_names_of_slurm_and_of_its_driver():
    named = {"H100": "h100", "nvidia_h100_80gb_hbm3": "h100", "nvidia_h100_pcie": "h100-pcie", "rtx_4090": "rtx-4090"}
    assert {name: gpu_in(name) and gpu_in(name).name for name in named} == named
    assert all(gpu_in(gpu.match) is gpu and gpu_in(name) is gpu for name, gpu in gpus().items())
    assert gpu_in("") is gpu_in("tesla") is gpu_in("rtx_a4000") is None
