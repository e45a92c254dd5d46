"""`mae_scale.load_encoder`: a run, a checkpoint or a file in any layout as a module, beside timm and our pipeline."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

import mae_scale
from data_pipeline.batch_order import EvaluationOrder
from data_pipeline.errors import UsageError
from data_pipeline.index_build import build_index
from data_pipeline.loader import ImageLoader
from mae_scale.checkpoints.export import checkpoint_model, export_weights
from mae_scale.checkpoints.store import list_checkpoints
from mae_scale.models.vit import patchify
from tests.loaders import on_cpu
from tests.old_runs import unpack


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A ViT-B/16 of timm's, and its weights in a file."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=0, global_pool="token").eval()
    file = tmp_path_factory.mktemp("base") / "vit_base.safetensors"
    save_file(model.state_dict(), file)
    return model, file


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two photographs as JPEGs, 640 x 427 pixels."""
    root = tmp_path_factory.mktemp("photos")
    for number, pixels in enumerate(load_sample_images().images):
        Image.fromarray(pixels).save(root / f"{number}.jpg", quality=95)
    return root


@torch.inference_mode()
def test_a_file_gives_the_tokens_that_timm_gives(base):
    peer, file = base
    encoder, images = mae_scale.load_encoder(file), torch.randn(2, 3, 224, 224)
    assert torch.allclose(encoder.forward_features(images), peer.forward_features(images), atol=1e-5)
    assert torch.allclose(encoder(images), peer(images), atol=1e-5)
    assert (encoder.size.width, encoder.size.heads, encoder.image_size, encoder.training) == (768, 12, 224, False)


@torch.inference_mode()
def test_a_run_its_checkpoint_and_what_it_exports_give_the_same(tmp_path):
    run, _ = unpack("pretrain_one_rank", tmp_path)
    checkpoint = list_checkpoints(run / "checkpoints")[-1][1]
    model, _ = checkpoint_model(checkpoint)
    export_weights(model, tmp_path / "weights.pth", "official")
    export_weights(model, tmp_path / "weights.safetensors", "hf")
    images = torch.randn(2, 3, 32, 32)
    expected = model.encoder(patchify(images, 4))
    for place, heads in ((run, None), (checkpoint, None), ("weights.pth", 2), ("weights.safetensors", 2)):
        encoder = mae_scale.load_encoder(tmp_path / place, heads=heads)
        assert torch.equal(encoder.forward_features(images), expected), place


@torch.inference_mode()
def test_a_classifier_gives_the_feature_that_its_head_sees(tmp_path):
    run, _ = unpack("finetune_one_rank", tmp_path)
    classifier, _ = checkpoint_model(list_checkpoints(run / "checkpoints")[-1][1])
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(mae_scale.load_encoder(run)(images), classifier.features(images))


def test_an_image_is_prepared_as_in_evaluation(base, photos):
    """Within 16 of 255 levels for any pixel and 0.25 in the mean, as our pipeline is to PIL."""
    encoder = mae_scale.load_encoder(base[1])
    index = build_index(photos, progress=False)
    with ImageLoader(index, EvaluationOrder(2), on_cpu(224, "evaluation")) as loader:
        expected = next(iter(loader)).images
    ours = torch.stack([encoder.transform(Image.open(photos / index.name(row))) for row in range(2)])
    levels = (ours - expected).abs() * 255 * 0.225
    assert (levels.mean() < 0.25, levels.max() < 16) == (True, True), (levels.mean(), levels.max())


def test_the_example_in_the_documentation_runs(base, photos):
    names = {"mae_scale": mae_scale, "weights": base[1], "photo": Image.open(photos / "0.jpg")}
    tests = doctest.DocTestFinder().find(mae_scale.load_encoder, "load_encoder", globs=names)
    assert doctest.DocTestRunner().run(tests[0]) == doctest.TestResults(failed=0, attempted=3)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda file: None, "no weights file at"),
        (lambda file: save_file({"x": torch.zeros(2)}, file), "does not hold the weights of a Vision Transformer"),
        (lambda file: _tiny(file), "which does not say its number of attention heads; give it"),
    ],
)
def test_what_is_no_encoder_is_said_in_one_line(made, says, tmp_path):
    made(tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match=says) as error:
        mae_scale.load_encoder(tmp_path / "weights.safetensors")
    assert "\n" not in str(error.value)


def _tiny(file: Path) -> None:
    model = timm.models.VisionTransformer(img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    save_file(model.state_dict(), file)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, mae_scale; print([m for m in ('torch', 'timm', 'deepspeed', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
