"""`mae-scale features`: the same rows on any number of ranks, in the index's order, equal to the encoder's own."""

import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import mae_scale as package
from data_pipeline.batch_order import EvaluationOrder
from data_pipeline.index_build import open_index
from data_pipeline.loader import ImageLoader
from tests.loaders import on_cpu
from tests.old_runs import SIZE, unpack

RECIPE = ["demo", *SIZE, "engine.micro_batch=50"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return unpack("pretrain_one_rank", tmp_path_factory.mktemp("run"))[0]


@pytest.fixture(scope="module")
def write(mae_scale, run, digits, tmp_path_factory):
    """Write the features of the digits' validation images; the file's tensors."""
    folder = tmp_path_factory.mktemp("features")

    def call(kind: str, nproc: int) -> dict[str, torch.Tensor]:
        out = folder / f"{kind}{nproc}.safetensors"
        words = ["--weights", run, "--out", out, "--kind", kind, "--nproc", nproc, f"data.root={digits}/val"]
        done = mae_scale("features", *RECIPE, *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{out}: features 355 x ")
        assert list(folder.glob(".*")) == []
        return load_file(out)

    return call


@pytest.mark.parametrize("kind", ["cls", pytest.param("mean", marks=pytest.mark.slow), "patch"])
def test_one_rank_and_two_write_the_same_rows_in_the_index_s_order(kind, write, digits):
    one, two = write(kind, 1), write(kind, 2)
    index = open_index(digits / "val", progress=False)
    assert one["features"].shape == ((355, 64, 16) if kind == "patch" else (355, 16))
    assert torch.allclose(one["features"], two["features"], atol=1e-5)
    for found in (one, two):
        assert found["valid"].all()
        assert np.array_equal(found["labels"].numpy(), index.label)
        assert bytes(found["names"].numpy()).decode().split("\n") == [index.name(row) for row in range(355)]


@torch.inference_mode()
def test_they_are_what_the_encoder_gives_for_the_evaluation_crop(write, run, digits):
    encoder, index = package.load_encoder(run), open_index(digits / "val", progress=False)
    with ImageLoader(index, EvaluationOrder(355), on_cpu(32, "evaluation")) as loader:
        tokens = encoder.forward_features(next(iter(loader)).images)
    assert torch.allclose(write("cls", 1)["features"], tokens[:, 0], atol=1e-5)
    assert torch.allclose(write("mean", 1)["features"], tokens[:, 1:].mean(1), atol=1e-5)
    assert torch.allclose(write("patch", 1)["features"], tokens[:, 1:], atol=1e-5)


def test_an_image_that_has_turned_bad_is_named_and_marked(mae_scale, run, digits, tmp_path):
    root = tmp_path / "val"
    for file in sorted((digits / "val").glob("*/*.jpg"))[::50]:
        (root / file.parent.name).mkdir(parents=True, exist_ok=True)
        (root / file.parent.name / file.name).write_bytes(file.read_bytes())
    bad = next(root.glob("*/*.jpg"))
    index = open_index(root, progress=False)
    known = bad.stat()  # a change that an index does not see
    bad.write_bytes(bytes(known.st_size))
    os.utime(bad, ns=(known.st_atime_ns, known.st_mtime_ns))
    words = ["--weights", run, "--out", tmp_path / "f.safetensors", f"data.root={root}"]
    done = mae_scale("features", *RECIPE, *words)
    assert done.returncode == 0, done.stderr
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        valid = file.get_tensor("valid").numpy()
    assert [index.name(row) for row in np.flatnonzero(~valid)] == [f"{bad.parent.name}/{bad.name}"]
    assert bad.name in done.stderr


def test_weights_for_another_image_size_are_refused_in_one_line(mae_scale, run, digits, tmp_path):
    words = ["--weights", run, "--out", tmp_path / "f.safetensors", f"data.root={digits}/val", "model.image_size=64"]
    done = mae_scale("features", *RECIPE, *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "add model.image_size=32" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kind", "pixels"], "--kind pixels is not known; expected cls, mean or patch"),
        (["data.root=null"], "data.root is not set; add data.root="),
        (["--out", "f.pth"], "expected a name that ends in .safetensors"),
        (["--out", "no/where/f.safetensors"], "there is no folder"),
        (["--weights", "nothing"], "--weights nothing does not exist"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, says, call, run, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--weights", run, "--out", "f.safetensors", f"data.root={digits}/val", *words]
    code, _, error = call("features", *RECIPE, *given)
    assert (code, error.count("\n")) == (2, 1), error
    assert says in error
    assert list(tmp_path.iterdir()) == []
