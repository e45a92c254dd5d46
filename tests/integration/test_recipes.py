"""Before a training: recipes list and show, --dry-run, --version, help and completion."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mae_scale import __version__
from mae_scale.config.load import load_recipe, packaged_recipes
from mae_scale.training.run_lock import hold
from tests.tiny import arguments


def test_recipes_list_has_every_recipe_with_what_it_is_and_should_reach_in_80_columns(mae_scale):
    lines = mae_scale("recipes", "list", COLUMNS="80").stdout.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == packaged_recipes()
    assert max(map(len, lines)) <= 80
    place = lines.index("pretrain/vit_huge_1600ep")
    assert lines[place + 1 : place + 3] == [
        "    ViT-H/14, masked autoencoder, 1600 epochs of ImageNet-1K",
        "    Expected: fine-tuning top-1 86.9 (87.8 at 448 px), linear probing 76.6.",
    ]
    groups = "\n".join(lines).split("\n\n")
    folders = [name.rpartition("/")[0] for name in packaged_recipes()]
    assert [text.splitlines()[0].rpartition("/")[0] for text in groups] == list(dict.fromkeys(folders))


def test_recipes_show_says_where_each_value_comes_from_and_is_a_recipe(tmp_path, call):
    overrides = ["data.root=/a b/train", "data.global_batch=2048", "tracking.uri=http://me:secret@host"]
    code, out, _ = call("recipes", "show", "partial/vit_huge", *overrides)
    assert code == 0
    for key, value, source in (
        ("trained_blocks", "4.0", "partial/vit_huge"),
        ("name", "vit_huge_patch14", "finetune/vit_huge_224"),
        ("epochs", "50", "finetune/vit_large_224"),
        ("betas", r"\[0.9, 0.999\]", "finetune/vit_base_224"),
        ("momentum", "0.9", "default"),
        ("global_batch", "2048", "command line"),
    ):
        assert re.search(rf"^  {key}: {value} +# {source}$", out, re.MULTILINE), key
    assert "# Expected: the paper gives no numbers for ViT-H" in out
    assert "secret" not in out
    (tmp_path / "shown.yaml").write_text(out)
    again = load_recipe(str(tmp_path / "shown.yaml"))
    assert again.flat() == load_recipe("partial/vit_huge", overrides).flat()
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demo\nclassifier: null\ndata: {threads: 2}\n")
    assert re.search(rf"  threads: 2 +# {file}", call("recipes", "show", file)[1])


def test_recipes_show_refuses_what_a_training_refuses(call):
    assert call("recipes", "show", "demo", "model.widht=3")[::2] == (
        2,
        "error: recipe demo: unknown key 'model.widht'; did you mean 'model.width'?\n",
    )


def files(*folders: Path) -> dict[Path, float]:
    """Every file and folder below, with its time."""
    return {path: path.stat().st_mtime_ns for folder in folders for path in (folder, *folder.rglob("*"))}


@pytest.fixture(scope="module")
def begun(tmp_path_factory, digits, mae_scale):
    """The folder of a run of two steps, with a checkpoint after each."""
    out = tmp_path_factory.mktemp("runs") / "begun"
    command = ["pretrain", "demo", "--out", out, "--tracking-uri", "off", *arguments(digits)]
    done = mae_scale(*command, "schedule.stop_after_steps=2", "checkpoint.every_steps=1")
    assert done.returncode == 0, done.stderr
    return out


def test_a_dry_run_says_what_the_first_start_would_do_and_writes_nothing(tmp_path, digits, call):
    data = tmp_path / "data"
    data.mkdir()
    for number, image in enumerate(sorted((digits / "train").rglob("*.jpg"))[:64]):
        (data / f"{number:03d}.jpg").write_bytes(image.read_bytes())
    command = ["pretrain", "demo", "--nproc", 2, "--out", tmp_path / "run", "--log-file", tmp_path / "log.txt"]
    more = [f"data.root={data}", "data.global_batch=16", "checkpoint.every_steps=3"]
    before = files(tmp_path)
    code, said, error = call(*command, "--dry-run", *arguments(digits, *more))
    assert (code, files(tmp_path)) == (0, before), error
    assert "64 images" in said
    assert "4 steps per epoch, 2 epochs, 8 steps; from the beginning" in said
    assert "deepspeed ZeRO 2, 2 rank(s) on cpu x 8 images x 1 = global batch 16" in said
    assert "rises to 0.000125 over 4 steps and falls to 0 at step 8; checkpoints: every 3 steps, " in said
    assert said.endswith("dry run, nothing was written: it would begin with step 1 and end after step 8\n")


def test_a_dry_run_says_where_the_start_would_go_on(tmp_path, digits, call, begun):
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    command = ["pretrain", "demo", "--out", out, "--tracking-uri", "off", *arguments(digits), "--dry-run"]
    before = files(tmp_path)
    code, said, _ = call(*command, "--quiet", "schedule.stop_after_steps=6")
    assert (code, said.count("\n")) == (0, 1)
    assert f"it would go on from step 2 ({out}/checkpoints) and end after step 6" in said
    assert "nothing to do: step 2 is done already" in call(*command, "schedule.stop_after_steps=1")[1]
    assert files(tmp_path) == before
    newest = out / "checkpoints" / "step_00000002" / "rank_00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    before = files(tmp_path)
    said = call(*command)[1]
    assert "step_00000002 is damaged and would be set aside: rank_00000.safetensors has " in said
    assert "it would go on from step 1 " in said
    assert files(tmp_path) == before


REFUSED = {
    "another recipe": (["model.width=64"], 2),
    "batch larger than the data": (["data.global_batch=2000"], 2),
    "ranks that do not fit": (["data.global_batch=121"], 2),
    "no folder": (["data.root=/no/such"], 2),
    "place that cannot be written to": (["--out", "FILE/run"], 2),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_refuses_what_the_start_refuses_with_the_same_words(case, tmp_path, digits, call, begun):
    (tmp_path / "FILE").write_text("x")
    words, code = REFUSED[case]
    words = [word.replace("FILE", str(tmp_path / "FILE")) for word in words]
    out = begun if case == "another recipe" else tmp_path / "run"
    command = ["pretrain", "demo", "--nproc", 2, "--out", out, "--tracking-uri", "off", *arguments(digits), *words]
    dry, real = call(*command, "--dry-run"), call(*command)
    assert dry == real
    assert dry[0] == code


def test_a_dry_run_is_refused_where_another_start_is_at_work(tmp_path, digits, begun, mae_scale):
    out = tmp_path / "run"
    shutil.copytree(begun, out)
    with hold(out):
        done = mae_scale("pretrain", "demo", "--out", out, "--dry-run", "--tracking-uri", "off", *arguments(digits))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"--out {out} is in use by process {os.getpid()}" in done.stderr


def test_a_dry_run_checks_weights_and_validation_images(tmp_path, digits, call, begun):
    command = ["finetune", "finetune/demo", "--weights", begun, "--out", tmp_path / "r", "--tracking-uri", "off"]
    command += ["--dry-run", f"data.root={digits}/train"]
    code, _, error = call(*command)
    assert code == 2
    assert f"{begun}/checkpoints/step_00000002: these are weights of a ViT (patch 8 px, width 32, 2 blocks)" in error
    sizes = ["model.patch_size=8", "model.width=32", "model.depth=2", "model.heads=2"]
    assert "does not exist" in call(*command, *sizes, "data.val_root=/no/such")[2]
    code, said, error = call(*command, *sizes, f"data.val_root={digits}/val")
    assert (code, said.splitlines()[-1].partition(":")[0]) == (0, "dry run, nothing was written"), error
    assert not (tmp_path / "r").exists()


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


LIGHT = """
import sys
sys.argv = ["mae-scale", *sys.argv[1:]]
from mae_scale.cli.main import main
try:
    main()
finally:
    heavy = {"torch", "deepspeed", "nvidia.dali", "mlflow", "numpy", "matplotlib"} & sys.modules.keys()
    assert not heavy, heavy
"""


def completed(words: str, position: int, shell: str = "bash") -> list[str]:
    """What a shell is offered for a line and the word that the cursor stands in."""
    if shell == "bash":
        environment = {"COMP_WORDS": words, "COMP_CWORD": str(position)}
    else:
        environment = {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = python(LIGHT, _MAE_SCALE_COMPLETE=f"complete_{shell}", **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["pretrain", "pretrain/vit_h"], ["pretrain/vit_huge_1600ep", "pretrain/vit_huge_800ep"]),
        (["recipes", "show", "probe/vit_l"], ["probe/vit_large"]),
        (["finetune", "demo", "--out", "x", "data.c"], ["data.crop_scale=", "data.cache=", "data.cache_gib="]),
        (["probe", "demo", "data.gl"], ["data.global_batch=", "data.global_batch=4096"]),
        (["evaluate", "demo", "data.root=x", "engine.zero_stage", "=", ""], ["0", "1", "2", "3"]),
        (["pretrain", "demo", "data.device", "=", "c"], ["cpu"]),
        (["pretrain", "demo", "data.root", "=", ""], []),
        (["submit", "demo", "probe/d"], ["probe/demo"]),
        (["submit", "demo", "seed"], ["seed=", "seed=0"]),
        (["pretrain", "demo", "--dry"], ["--dry-run"]),
    ],
)
def test_a_shell_completes_recipes_keys_and_values_without_torch(line, expected):
    assert completed("\n".join(["mae-scale", *line]), len(line)) == expected


def test_a_shell_that_keeps_the_key_with_its_value_is_offered_both():
    assert completed("mae-scale pretrain demo data.device=", 0, "fish")[1:] == ["data.device=cpu", "data.device=gpu"]


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["pretrain", "--help"], ["recipes", "list"]])
def test_version_and_help_import_nothing_heavy(words):
    done = python(f"import sys; sys.argv += {words!r}\n{LIGHT}")
    assert done.returncode == 0, done.stderr
    if words == ["--version"]:
        assert done.stdout == f"mae-scale {__version__}\n"


COMMANDS = ["pretrain", "finetune", "probe", "doctor", "demo", "submit", "export", "evaluate", "knn", "reconstruct"]
BELOW = {
    "data": ["index", "verify", "pack", "sample", "scenes"],
    "checkpoints": ["list", "prune"],
    "recipes": ["list", "show"],
}


@pytest.mark.parametrize(
    "words", [[], *([c] for c in COMMANDS), *([a, b] for a in BELOW for b in BELOW[a])], ids=" ".join
)
def test_help_shows_no_types_of_python(call, words):
    code, out, _ = call(*words, "--help")
    assert code == 0
    assert out.lstrip().startswith("Usage: mae-scale")
    assert not re.search(r"<(bool|int|str|path|float|list)\b", out), out
