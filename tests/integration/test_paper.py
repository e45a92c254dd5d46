"""`mae-scale paper`: killed and resumed, its page and its runs in MLflow, on images of one's own; what it refuses."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mae_scale.config.load import load_recipe
from mae_scale.reproduce.paper.findings import SPEED
from mae_scale.tracking.metrics_log import read_metrics

FINDING = ["--finding", "mask-tokens-in-the-encoder"]
RUNS = 6  # per seed: two pre-trainings, each fine-tuned and probed


@pytest.fixture(scope="module")
def images(digits, tmp_path_factory):
    """13 digits of each class to train on, and 5 to validate."""
    root = tmp_path_factory.mktemp("images")
    for part, count in (("train", 13), ("val", 5)):
        for folder in (digits / part).iterdir():
            if folder.is_dir():
                (root / part / folder.name).mkdir(parents=True)
                for image in sorted(folder.glob("*.jpg"))[:count]:
                    shutil.copy(image, root / part / folder.name)
    return root


def starts(folder):
    """The step after which each start of a run has begun."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event["step"] for event in events if event["event"] == "start"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_goes_on_where_it_was_stopped_and_says_what_its_runs_have_measured(images, tmp_path, mae_scale):
    out = tmp_path / "paper"
    words = ["paper", "--data", images, "--out", out, "--seeds", 2, "--jobs", 2, "--epochs", 4, *FINDING]
    started = subprocess.Popen([sys.executable, "-m", "mae_scale", *map(str, words)], stdout=subprocess.PIPE, text=True)
    for _ in range(600):  # until a pre-training is at work
        if any(read_metrics(path) for path in out.glob("runs/*/metrics.jsonl")):
            break
        time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=120) == 75
    assert not (out / "paper.md").exists()
    stopped = {path.parent.parent.parent for path in out.glob("runs/*/checkpoints/*/manifest.json")}
    assert stopped

    done = mae_scale(*words, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"/{RUNS} ") == 2 * RUNS
    for folder in stopped:
        assert [start > 0 for start in starts(folder)] == [False, True], folder
    kept = json.loads((out / "paper.json").read_text())
    (finding,) = kept["findings"]
    for arm in finding["arms"]:
        for measure in ("finetune", "probe"):
            found = [
                read_metrics(out / "runs" / f"{arm['run']}.{measure}_seed-{seed}" / "metrics.jsonl")[-1]["val/top1"]
                for seed in (0, 1)
            ]
            assert arm["values"][measure] == found
    inside, outside = (arm["values"]["probe"] for arm in finding["arms"])
    assert finding["claims"][0]["differences"] == [b - a for a, b in zip(inside, outside, strict=True)]
    assert (
        "| Mask tokens in the encoder | probing is better without them | 73.5 to 59.6 |"
        in (out / "paper.md").read_text()
    )
    assert (out / "paper.png").stat().st_size > 5000

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{out / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mae-scale")
    found = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in found if run.data.tags["mae_scale.task"] == "sweep"]
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 2 * RUNS
    assert "# The paper's findings in small" in parent.data.tags["mlflow.note.content"]
    assert parent.info.run_name == "paper"

    other = mae_scale(*words, "--epochs", 8)
    assert other.returncode == 2
    assert "holds another comparison (epochs: 4 -> 8); choose another --out" in other.stderr
    again = mae_scale(*words)
    assert again.returncode == 0
    assert json.loads((out / "paper.json").read_text()) == kept


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_words_beit_and_moco_are_compared_by_their_own_runs(images, tmp_path, mae_scale):
    out = tmp_path / "paper (1) #2"
    words = ["paper", "--data", images, "--out", out, "--seeds", 1, "--jobs", 2, "--epochs", 4, "--labels", 2]
    words += ["--finding", "methods", "--finding", "partial-fine-tuning"]
    refused = mae_scale(*words)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "the sweep's name 'paper (1) #2' is not possible" in refused.stderr
    words[4] = out = tmp_path / "a #b" / "paper"
    done = mae_scale(*words, timeout=800)
    assert done.returncode == 0, done.stderr
    kept = json.loads((out / "paper.json").read_text())
    partial, methods = kept["findings"]
    assert [arm["run"] for arm in methods["arms"]] == ["mae", "beit", "beit-pixels", "moco"]
    for finding in kept["findings"]:
        for arm in finding["arms"]:
            for measure, (found,) in arm["values"].items():
                assert 0 < found < (np.inf if measure == SPEED else 100.1)
    assert all(claim["verdict"] == "not decided" for one in (partial, methods) for claim in one["claims"])
    assert 0 < kept["words_used"][0] <= 1
    files = (out / "runs").glob("*/recipe.yaml")
    recipe = {file.parent.name.removesuffix("_seed-0"): load_recipe(str(file)) for file in files}
    assert recipe["beit"].tokeniser.weights == out / "runs" / "tokeniser_seed-0"
    assert recipe["beit-pixels"].tokeniser is None
    assert recipe["moco.partial-0.5"].classifier.weights == out / "runs" / "moco_seed-0"
    assert recipe["beit.probe"].model.encoder == "beit"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--data", "nowhere"], "--data nowhere has no folder train; expected train/ and val/"),
        (
            ["--finding", "depth"],
            "--finding depth is not known; expected one of mask-ratio, mask-tokens-in-the-",
        ),
        (["optim.base_lr=1"], "optim.base_lr: what is compared is fixed; only settings that change no result"),
        (["seed=7"], "seed: what is compared is fixed"),
        (["tracking.uri=http://me:secret@host", "data.root=x"], "data.root: what is compared is fixed"),
        (["--labels", "200"], "expected at least 64 images of two classes, and --labels 200 of each"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_run_is_started(more, said, call, tmp_path):
    code, _, stderr = call("paper", "--out", tmp_path / "paper", *more)
    assert (code, stderr.count("\n")) == (2, 1)
    assert said in stderr
    assert "secret" not in stderr
    assert not (tmp_path / "paper" / "runs").exists()
