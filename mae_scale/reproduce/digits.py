"""`mae-scale demo`: digits as JPEGs, pre-training with two ranks, what was learned, where everything is."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from data_pipeline.errors import EXIT_STOPPED, RunError
from data_pipeline.samples import write_digits
from mae_scale.config.load import load_recipe
from mae_scale.config.schema import Recipe
from mae_scale.launch.local import launch_local_ranks
from mae_scale.passwords import without_password
from mae_scale.tracking.finished_run import add_metrics

LABELS_PER_CLASS = 10
LABEL_DRAWS = 5
RANKS = 2


def run_demo(out: Path, seed: int, more: Sequence[str] = ()) -> None:
    """Run the whole story below `out`; a second call goes on where the first one stopped.

    more: further overrides of the recipe.
    """
    began, console = time.monotonic(), Console(highlight=False, soft_wrap=True)
    digits, run = out / "digits", out / f"run-seed{seed}"
    overrides = [f"data.root={digits}/train", f"data.val_root={digits}/val", f"seed={seed}", *more]

    console.rule("1. Images", align="left")
    write_digits(digits)
    console.print(f"{digits}: scikit-learn's handwritten digits, 32 px JPEGs, train and val, ten classes")

    console.rule(f"2. Pre-training: {RANKS} ranks, ZeRO-2, DALI, activation checkpointing, MLflow", align="left")
    if code := launch_local_ranks(RANKS, ["pretrain", "demo", "--out", str(run), *overrides]):
        if code == EXIT_STOPPED:
            sys.exit(code)
        raise RunError(f"pre-training ended with exit code {code}; what it said stands above")

    console.rule("3. What it learned", align="left")
    recipe = load_recipe("demo", overrides)
    before = probe(recipe, digits, weights=None)
    after = probe(recipe, digits, weights=run / "export" / "model.safetensors")
    console.print(
        f"held-out accuracy of logistic regression on frozen features, {LABELS_PER_CLASS} labels per class\n"
        f"(mean of {LABEL_DRAWS} draws of the labels): "
        f"[bold]{before:.3f}[/] with random weights, [bold]{after:.3f}[/] after pre-training"
    )
    add_metrics(run, recipe.tracking.uri, {"probe/top1": 100 * after, "probe/top1_random_weights": 100 * before})

    console.rule("4. Where everything is", align="left")
    for what, where in (
        ("reconstructions", run / "figures" / "reconstructions.png"),
        ("loss curve", run / "figures" / "loss_curve.png"),
        ("metrics", run / "metrics.jsonl"),
        ("checkpoints", run / "checkpoints"),
        ("weights (authors' layout)", run / "export" / "model.safetensors"),
    ):
        console.print(f"{what:26} {where}")
    console.print(f"{'MLflow page':26} {mlflow_page(out)}")
    console.print(f"({time.monotonic() - began:.0f} s in all)")


def mlflow_page(out: Path) -> str:
    """Return the command that shows the runs below `out` in a browser."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(out / 'mlflow.db').resolve()}"
    return f"{Path(sys.executable).with_name('mlflow')} ui --backend-store-uri {without_password(uri)}"


def probe(recipe: Recipe, digits: Path, weights: Path | None) -> float:
    """Return the held-out accuracy of logistic regression on frozen mean-pooled features, ten labels per class.

    The labelled images are drawn LABEL_DRAWS times; the accuracy over all of val/ is their mean.
    `weights` is a file in the authors' layout; None: the recipe's initial weights.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train_x, train_y = features(recipe, digits / "train", weights)
    test_x, test_y = features(recipe, digits / "val", weights)
    accuracies = []
    for draw in range(LABEL_DRAWS):
        random = np.random.default_rng(draw)
        chosen = np.concatenate(
            [random.choice(np.flatnonzero(train_y == c), LABELS_PER_CLASS, replace=False) for c in np.unique(train_y)]
        )
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        classifier.fit(train_x[chosen], train_y[chosen])
        accuracies.append(classifier.score(test_x, test_y))
    return float(np.mean(accuracies))


def features(recipe: Recipe, root: Path, weights: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Return mean-pooled encoder features [N, D] float32 and labels [N] int64 of every image below `root`."""
    import torch

    from data_pipeline.augment.kinds import augmentation
    from data_pipeline.batch_order import EvaluationOrder
    from data_pipeline.index_build import open_index
    from data_pipeline.loader import ImageLoader
    from mae_scale.models.build import build_model
    from mae_scale.models.weights.autoencoder import load_official
    from mae_scale.models.weights.files import read_weights
    from mae_scale.training.decoding import decoding_on_cpu

    torch.manual_seed(recipe.seed)
    model = build_model(recipe).eval()
    if weights is not None:
        load_official(model, read_weights(weights))
    pooled, labels = [], []
    index, decoding = open_index(root, progress=False), decoding_on_cpu(recipe, augmentation("evaluation"))
    with ImageLoader(index, EvaluationOrder(64), decoding) as loader, torch.inference_mode():
        for batch in loader:
            pooled.append(model.forward_features(batch.images)[:, 1:].mean(1).numpy()[batch.valid])
            labels.append(batch.labels.numpy()[batch.valid])
    return np.concatenate(pooled), np.concatenate(labels)
