"""`mae-scale submit` without a Slurm: what it renders, what it refuses, and what it says to sbatch."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mae_scale.cli.main import main
from tests.tokenisers import tokeniser_file

TEMPLATES = Path(__file__).parents[2] / "slurm"
HUGE = "pretrain/vit_huge_1600ep"
LARGE = "pretrain/vit_large_1600ep"
BEIT, MOCO = "pretrain/beit_vit_base_800ep", "pretrain/moco_v3_vit_base"
RUNS = [f'run_job {kind} "$@"' for kind in ("pretrain", "finetune", "finetune")]


@pytest.fixture
def submit(monkeypatch, capsys, tmp_path):
    """Call `mae-scale submit ARGUMENTS` in an empty folder; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_TIMELIMIT"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mae-scale", "submit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """sinfo, sbatch and scancel that note how they are called; the notes, one line a call."""
    commands, notes = tmp_path / "bin", tmp_path / "calls"
    commands.mkdir()
    note = f'#!/bin/bash\necho "${{0##*/}} $* [${{SBATCH_PARTITION:-}}]" >>{notes}\n'
    programs = {
        "sinfo": 'echo "small* 2"; echo "large 10"; echo "large 6"\n',
        "sbatch": f'case $*" " in *--test-only*) ;; *) echo $((100 + $(grep -c parsable {notes}))) ;; esac\n',
        "scancel": "",
    }
    for name, body in programs.items():
        (commands / name).write_text(note + body)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")

    def calls() -> list[str]:
        return notes.read_text().splitlines() if notes.exists() else []

    calls.folder = commands
    return calls


@pytest.fixture
def no_slurm(monkeypatch, tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "bash").symlink_to(shutil.which("bash"))
    (commands / "dirname").symlink_to(shutil.which("dirname"))
    monkeypatch.setenv("PATH", str(commands))


def options(script: str) -> dict[str, str]:
    """{option: value} of a script's #SBATCH lines; an option given twice fails."""
    lines = [line.removeprefix("#SBATCH --").partition("=") for line in script.splitlines() if "#SBATCH" in line]
    found = {name: value for name, _, value in lines}
    assert len(found) == len(lines)
    return found


def arguments(script: str) -> list[str]:
    """What the script hands to `mae-scale`."""
    (line,) = [line for line in script.splitlines() if line.startswith("set -- ")]
    return shlex.split(line)[2:]


def test_a_chain_is_rendered_and_sent_each_link_after_the_one_before(submit, slurm, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"extends: {HUGE}\n")
    code, out, error = submit(
        HUGE, "data.root=/my data", recipe.name, "--nodes", 16, "--out", "runs", "--partition", "large"
    )
    assert code == 0, error
    folder = tmp_path / "runs" / "slurm"
    scripts = [folder / "1-pretrain-vit_huge_1600ep.sbatch", folder / "2-mine.sbatch"]
    jobs = [line.partition(":")[0] for line in out.splitlines() if line.startswith("job ")]
    assert jobs == ["job 101", "job 102, after 101"]
    assert slurm()[1:] == [
        f"sbatch --test-only {scripts[0]} []",
        f"sbatch --test-only {scripts[1]} []",
        f"sbatch --parsable {scripts[0]} []",
        f"sbatch --parsable --dependency=afterok:101 --kill-on-invalid-dep=yes {scripts[1]} []",
    ]
    first, second = (script.read_text() for script in scripts)
    assert arguments(first) == [HUGE, "--out", f"{tmp_path}/runs/pretrain-vit_huge_1600ep", "data.root=/my data"]
    assert arguments(second) == [str(recipe), "--out", f"{tmp_path}/runs/mine", "data.root=/my data"]
    wanted = {"nodes": "16", "gpus-per-node": "8", "ntasks-per-node": "8", "partition": "large"}
    wanted |= {"job-name": "mae-mine", "output": f"{folder}/2-mine-%j.log", "requeue": "", "open-mode": "append"}
    assert wanted.items() <= options(second).items()
    assert (folder / "environment.sh").read_text() == (TEMPLATES / "environment.sh").read_text()


def scripts(out: str) -> list[str]:
    """The scripts that a dry run shows."""
    return out.split("#!/usr/bin/env bash")[1:]


def test_a_classifier_starts_from_the_link_before_it_and_alone_gets_the_overrides_of_its_section(
    submit, no_slurm, tmp_path
):
    chain = [HUGE, "finetune/vit_huge_224", "finetune/vit_huge_448"]
    both = ["data.root=/d", "model.drop_path=0.1"]
    code, out, error = submit(*chain, *both, "classifier.mixup=0.4", "--nodes", 16, "--out", "runs", "--dry-run")
    assert code == 0, error
    runs = [f"{tmp_path}/runs/{recipe.replace('/', '-')}" for recipe in chain]
    assert [arguments(script) for script in scripts(out)] == [
        [chain[0], "--out", runs[0], *both],
        [chain[1], "--out", runs[1], *both, "classifier.mixup=0.4", f"classifier.weights={runs[0]}"],
        [chain[2], "--out", runs[2], *both, "classifier.mixup=0.4", f"classifier.weights={runs[1]}"],
    ]
    assert [line for line in out.splitlines() if line.startswith("run_job")] == RUNS


@pytest.mark.parametrize(
    ("chain", "own"),
    [
        (["pretrain/beit_vit_base_800ep", "finetune/beit_vit_base_224"], "tokeniser.weights={}"),
        (["pretrain/moco_v3_vit_base", "finetune/moco_v3_vit_base"], "moco.momentum=0.99"),
    ],
)
def test_a_classifier_after_beit_or_moco_gets_none_of_their_overrides(submit, no_slurm, digits, tmp_path, chain, own):
    own = own.format(tokeniser_file(tmp_path / "tokeniser.safetensors", digits, words=16))
    code, out, error = submit(*chain, "data.root=/d", own, "--nodes", 4, "--out", "runs", "--dry-run")
    assert code == 0, error
    first = f"{tmp_path}/runs/{chain[0].replace('/', '-')}"
    assert [arguments(script)[3:] for script in scripts(out)] == [
        ["data.root=/d", own],
        ["data.root=/d", f"classifier.weights={first}"],
    ]


def test_what_predicts_words_takes_the_tokeniser_of_the_last_link_before_it_that_trains_one(submit, no_slurm, tmp_path):
    large = tmp_path / "large.yaml"
    large.write_text("extends: pretrain/dvae_imagenet_256\ntokeniser: {words: 16384}\n")
    tokens = "pretrain/vit_large_tokens_800ep"
    links = ["pretrain/dvae_imagenet_256", BEIT, large, tokens, "finetune/vit_large_224"]
    code, out, error = submit(*links, "data.root=/d", "tokeniser.width=128", "--nodes", 4, "--out", "runs", "--dry-run")
    assert code == 0, error
    runs = [f"{tmp_path}/runs/{label}" for label in ("pretrain-dvae_imagenet_256", "large", tokens.replace("/", "-"))]
    both = ["data.root=/d", "tokeniser.width=128"]
    assert [arguments(script)[3:] for script in scripts(out)] == [
        both,
        [*both, f"tokeniser.weights={runs[0]}"],
        both,
        [*both, f"tokeniser.weights={runs[1]}"],
        ["data.root=/d", f"classifier.weights={runs[2]}"],
    ]


def test_the_recipe_and_not_its_name_decides_the_template(submit, no_slurm, tmp_path):
    (tmp_path / "pretrain").mkdir()
    trains, classifies = tmp_path / "finetune.yaml", tmp_path / "pretrain" / "mine.yaml"
    trains.write_text(f"extends: {LARGE}\n")
    classifies.write_text("extends: scratch/vit_large\n")
    recipes = [trains, classifies, "partial/vit_large"]
    code, out, error = submit(*recipes, "data.root=/d", "--nodes", 4, "--out", "runs", "--dry-run")
    assert code == 0, error
    assert [line for line in out.splitlines() if line.startswith("run_job")] == RUNS


def test_weights_that_are_given_are_those_of_every_classifier(submit, no_slurm, tmp_path):
    """A file that is there, or the folder that a link before will fill."""
    file = tmp_path / "mae.pth"
    file.touch()
    for weights in (file, "runs/pretrain-vit_large_1600ep"):
        chain = [LARGE, "finetune/vit_large_224", "probe/vit_large", f"classifier.weights={weights}", "data.root=/d"]
        code, out, error = submit(*chain, "--nodes", 4, "--out", "runs", "--dry-run")
        assert code == 0, error
        given = [[word for word in arguments(script) if word.startswith("classifier.")] for script in scripts(out)]
        assert given == [[], [f"classifier.weights={weights}"], [f"classifier.weights={weights}"]]


def test_dry_run_shows_the_scripts_and_writes_and_sends_nothing_even_without_slurm(submit, no_slurm, tmp_path):
    code, out, error = submit(HUGE, "--nodes", 16, "--out", "runs", "data.root=/d", "--dry-run")
    assert code == 0, error
    assert "#SBATCH --nodes=16" in out
    assert f"sbatch --parsable {tmp_path}/runs/slurm/1-pretrain-vit_huge_1600ep.sbatch" in out
    assert "no Slurm answers here" in out
    assert not (tmp_path / "runs").exists()


def test_without_slurm_it_says_so(submit, no_slurm, tmp_path):
    code, _, error = submit(HUGE, "--nodes", 16, "--out", "runs", "data.root=/d")
    assert code == 2
    assert "Slurm is not found here" in error
    assert "--dry-run" in error
    assert not (tmp_path / "runs").exists()


def test_a_rendered_script_is_the_template_but_for_the_options_and_arguments(submit, no_slurm):
    """And bash can read it."""
    command = [HUGE, "--nodes", 2, "--out", "r", "data.root=/d", "--dry-run"]
    _, out, _ = submit(*command, "--gpus-per-node", 0, "--ntasks-per-node", 4, "--time", "1:00:00", "--account", "me")
    found, template = options(out), (TEMPLATES / "pretrain.sbatch").read_text()
    changed = {"nodes": "2", "ntasks-per-node": "4", "time": "1:00:00", "account": "me"}
    assert changed.items() <= found.items()
    assert "gpus-per-node" not in found
    kept = options(template).keys() - changed.keys() - {"gpus-per-node", "job-name", "output"}
    assert {name: found[name] for name in kept} == {name: options(template)[name] for name in kept}
    code = [line for line in template.splitlines() if not line.startswith("#SBATCH")]
    assert set(code) <= set(out.splitlines())
    script = out[out.index("#!") : out.index("dry run:")]
    assert subprocess.run(["/bin/bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_the_site_is_what_its_environment_file_says_and_the_environment_wins(submit, slurm, tmp_path, monkeypatch):
    site = tmp_path / "slurm" / "environment.sh"
    site.parent.mkdir()
    plain = (TEMPLATES / "environment.sh").read_text()
    site.write_text(plain.replace("${SBATCH_PARTITION:=}", "${SBATCH_PARTITION:=large}"))
    command = [HUGE, "--nodes", 2, "--out", "runs", "data.root=/d"]
    script = tmp_path / "runs" / "slurm" / "1-pretrain-vit_huge_1600ep.sbatch"
    for variable, option, expected in ((None, None, "large"), ("small", None, "small"), ("small", "large", "large")):
        if variable is not None:
            monkeypatch.setenv("SBATCH_PARTITION", variable)
        code, _, error = submit(*command, *(["--partition", option] if option else []))
        assert code == 0, error
        assert options(script.read_text())["partition"] == expected
    # sbatch would take the variable above the script.
    assert all(call.endswith(" []") for call in slurm())
    assert (script.parent / "environment.sh").read_text() == site.read_text()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ([HUGE, "--nodes", 3], ["data.global_batch=4096 is not divisible by 24 ranks", HUGE, "3 nodes x 8 ranks"]),
        ([HUGE, "--nodes", 4], ["partition 'small' has 2 nodes", "--partition large"]),
        ([HUGE, "engine.micro_batch=16", "--nodes", 32, "--partition", "large"], ["partition 'large' has 16 nodes"]),
        ([HUGE, "--nodes", 2, "--partition", "lage"], ["partition 'lage' is not there", "small, large"]),
        (["finetune/vit_huge_224", HUGE, "--nodes", 2], ["vit_huge_224 has no weights", "classifier.weights="]),
        ([LARGE, "finetune/vit_huge_224", "--nodes", 2], [f"it starts from {LARGE}", "weights of vit_large_patch16"]),
        ([LARGE, "finetune/vit_large_224", "probe/vit_large", "--nodes", 2], ["pools by mean", "pools by cls"]),
        ([LARGE, "probe/vit_large", "engine.micro_batch=8", "--nodes", 2], ["probe/vit_large on", "drop engine.micro"]),
        ([LARGE, "finetune/vit_large_224", "engine.micro_batch=1", "--nodes", 2], ["vit_large_224 on", "even"]),
        ([LARGE, "probe/vit_large", "data.augmentation=none", "--nodes", 2], ["no random resized crop"]),
        (
            ["finetune/vit_huge_224", "classifier.weights=/no", "--nodes", 2],
            ["classifier.weights=/no (--weights) does not exist"],
        ),
        ([HUGE, "classifier.mixup=0", "--nodes", 2], ["'classifier.mixup=0' is for task classification", HUGE]),
        ([HUGE, "moco.momentum=0.9", "--nodes", 2], ["'moco.momentum=0.9' is for task moco", HUGE]),
        ([BEIT, "--nodes", 2], ["beit_vit_base_800ep on", "needs a tokeniser", "tokeniser.weights=PATH"]),
        ([BEIT, f"tokeniser.weights={__file__}", "--nodes", 2], ["beit_vit_base_800ep on", f"{__file__} was refused"]),
        ([BEIT, "finetune/vit_base_224", "model.target=pixels", "--nodes", 2], ["starts from pretrain/beit", "BEiT"]),
        ([MOCO, "finetune/beit_vit_base_224", "--nodes", 2], ["it starts from pretrain/moco_v3_vit_base"]),
        (["pretrain/dvae_imagenet_256", "finetune/vit_base_224", "--nodes", 2], ["trains a tokeniser, and no encoder"]),
        (
            [MOCO, BEIT, "tokeniser.weights=runs/pretrain-moco_v3_vit_base", "--nodes", 2],
            ["beit_vit_base_800ep on", f"{MOCO} trains no tokeniser"],
        ),
        (["pretrain/vit_hug_1600ep", "--nodes", 2], ["did you mean 'pretrain/vit_huge_1600ep'"]),
        ([HUGE, HUGE, "--nodes", 2], ["give each recipe once"]),
        ([HUGE, "--nodes", 2, "data.root=null"], ["data.root is not set"]),
        ([HUGE, "--nodes", 2, "data.rot=/d"], ["unknown key 'data.rot'", "data.root"]),
        (["optim.base_lr=1", "--nodes", 2], ["no recipe given"]),
    ],
)
def test_what_cannot_run_is_refused_before_sbatch_is_called(submit, slurm, tmp_path, command, says):
    code, _, error = submit(command[0], "data.root=/d", *command[1:], "--out", "runs")
    assert code == 2
    assert error.count("\n") == 1
    assert all(part in error for part in says), error
    assert not any(call.startswith("sbatch") for call in slurm())
    assert not (tmp_path / "runs").exists()


def test_a_link_that_sbatch_refuses_takes_those_before_it_along(submit, slurm, tmp_path):
    program = slurm.folder / "sbatch"
    program.write_text(program.read_text() + 'case $* in *afterok*) echo "sbatch: error: no" >&2; exit 1 ;; esac\n')
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"extends: {HUGE}\n")
    code, _, error = submit(HUGE, recipe, "--nodes", 2, "--out", "runs", "data.root=/d")
    assert code == 1
    assert "link 2" in error
    assert "no" in error
    assert slurm()[-1] == "scancel 101 []"


def test_the_shell_scripts_pass_shellcheck():
    scripts = [*TEMPLATES.glob("*.sbatch"), *TEMPLATES.glob("*.sh"), *TEMPLATES.parent.glob("tests/cluster/*.sh")]
    scripts.append(TEMPLATES.parent / "setup.sh")
    assert len(scripts) >= 6
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, "--external-sources", *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


NOTHING = ".hidden damaged_step_00000300 step_00000400"


@pytest.mark.parametrize(
    ("folders", "newest"),
    [("", "0"), ("step_00000008 step_00000010", "10"), ("step_00001250 " + NOTHING, "1250"), (NOTHING, "0")],
)
def test_the_newest_step_is_that_of_the_newest_checkpoint_with_a_manifest(tmp_path, folders, newest):
    for name in folders.split():
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "step_00000400":
            (tmp_path / "checkpoints" / name / "manifest.json").touch()
    told = bash('newest_step "$1"', tmp_path)
    assert told.stdout.strip() == newest, told.stderr


@pytest.mark.parametrize(
    ("starts", "now", "stops"),
    [([], 0, False), ([0], 0, False), ([0, 0], 0, True), ([0, 5], 5, False), ([5, 5], 5, True), ([5, 5], 6, False)],
)
def test_two_starts_without_a_new_step_are_the_last(tmp_path, starts, now, stops):
    (tmp_path / "checkpoints" / f"step_{now:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / f"step_{now:08d}" / "manifest.json").touch()
    (tmp_path / "starts").write_text("".join(f"{step}\n" for step in starts))
    told = bash('stop_without_progress "$1/starts" "$1"', tmp_path)
    assert told.returncode == (1 if stops else 0)
    assert ("two starts brought no step" in told.stdout) == stops


def test_a_signal_is_handed_on_and_the_commands_own_code_comes_back():
    child = 'trap "exit 75" USR1; kill -USR1 $PPID; sleep 5 >/dev/null & wait'
    told = bash('supervise bash -c "$1" || echo "code $?"', child)
    assert told.stdout.strip() == "code 75", told.stderr


def test_a_signal_while_the_command_is_started_is_kept_for_it():
    """It comes when the command runs already, and the shell has not yet noted its process."""
    signal = "set -T; trap '[[ $BASH_COMMAND != child=\\$! ]] || { trap - DEBUG; sleep 0.5; kill -USR1 $$; }' DEBUG; "
    told = bash(signal + 'supervise bash -c "$1" || echo "code $?"', 'trap "exit 75" USR1; sleep 5 >/dev/null & wait')
    assert told.stdout.strip() == "code 75", told.stderr


def bash(code: str, *arguments) -> subprocess.CompletedProcess:
    """Run shell code that has sourced environment.sh, as a template does."""
    source = f"set -euo pipefail; source {TEMPLATES / 'environment.sh'}; {code}"
    return subprocess.run(["bash", "-c", source, "bash", *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("uri", ["http://me:hidden@host", "postgresql://host/db?user=me&password=hidden"])
def test_a_password_does_not_get_into_a_script(submit, no_slurm, tmp_path, uri):
    code, out, error = submit(HUGE, "data.root=/d", f"tracking.uri={uri}", "--nodes", 16, "--out", "runs", "--dry-run")
    assert (code, error.count("\n")) == (2, 1)
    assert "export the whole URI as MLFLOW_TRACKING_URI" in error
    assert "hidden" not in out + error
    assert not (tmp_path / "runs").exists()


def test_detection_and_segmentation_start_from_the_last_link_that_is_neither(submit, no_slurm, tmp_path):
    """Each its own data: recipes of the user's own name COCO and ADE20K."""
    for task, keys in (
        ("detection", {"annotations": "/c.json"}),
        ("segmentation", {"labels": "/l", "class_names": "/n.txt"}),
    ):
        own = {"extends": f"{task}/vit_large", "data": {"root": f"/{task}"}, task: keys}
        (tmp_path / f"{task}.yaml").write_text(json.dumps(own))
    (tmp_path / "first.yaml").write_text(json.dumps({"extends": LARGE, "data": {"root": "/imagenet"}}))
    chain = ["first.yaml", "detection.yaml", "segmentation.yaml"]
    code, out, error = submit(*chain, "--nodes", 2, "--out", "runs", "--dry-run")
    assert code == 0, error
    assert f"detection.weights={tmp_path}/runs/first" in out
    assert f"segmentation.weights={tmp_path}/runs/first" in out
    code, _, error = submit("detection/vit_huge", "data.root=/d", "--nodes", 2, "--out", "runs", "--dry-run")
    assert code == 2
    assert "detection/vit_huge has no weights to start from; put the recipe that trains them before it" in error
    code, _, error = submit(LARGE, "detection/vit_huge", "data.root=/d", "--nodes", 2, "--out", "runs", "--dry-run")
    assert code == 2
    assert "it starts from pretrain/vit_large_1600ep, and these are weights of vit_large_patch16" in error


def test_a_classifier_cannot_start_from_a_detector(submit, no_slurm, tmp_path):
    chain = [LARGE, "detection/vit_large", "finetune/vit_large_224", "data.root=/d", "detection.annotations=/c.json"]
    code, _, error = submit(*chain, "--nodes", 4, "--out", "runs", "--dry-run")
    assert code == 2
    assert "it starts from detection/vit_large, and " in error
    assert "detector" in error
