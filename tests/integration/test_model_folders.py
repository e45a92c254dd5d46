"""`mae-scale export --format hf|timm` into a folder, which transformers and timm open with nothing else said."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from data_pipeline.augment.kinds import augmentation
from data_pipeline.index_build import open_index
from mae_scale.checkpoints import model_folder
from mae_scale.checkpoints.shards import EMA, Piece, write_shard
from mae_scale.checkpoints.store import folder_of, write_manifest
from mae_scale.config.load import load_recipe
from mae_scale.models.build import build_classifier_of, build_model
from mae_scale.models.vit import SIZES
from mae_scale.training.shown_images import some_images

pytestmark = pytest.mark.timeout(120)
CLASSES = ["cat", "dog", "gnu", "owl", "yak"]
ODD = ["image_size=40", "patch_size=8", "width=48", "depth=3", "heads=3"]  # 25 patches, heads of 16
ODD += ["decoder_width=24", "decoder_depth=1", "decoder_heads=2", "mask_ratio=0.6"]
CLS = ["classifier.pool=cls"]
NAMED = ["model.name=vit_base_patch16", "model.image_size=224", "model.patch_size=null", "model.width=null"]
NAMED += ["model.depth=2", "model.heads=null", "model.decoder_width=512", "model.decoder_heads=16"]


@pytest.fixture
def checkpoint(tmp_path):
    """Write the checkpoint of a recipe with random weights, as a run would; its folder and the model."""

    def write(name: str, *overrides: str):
        recipe = load_recipe(name, [f"model.{size}" for size in ODD] + list(overrides))
        torch.manual_seed(0)
        model = build_model(recipe) if recipe.classifier is None else build_classifier_of(recipe, len(CLASSES))
        for tensor in model.state_dict().values():
            tensor.add_(0.02 * torch.randn_like(tensor))
        kind = "weight" if recipe.classifier is None or recipe.classifier.ema is None else EMA
        kinds = {key: kind for key, _ in model.named_parameters()}
        pieces = [
            Piece(f"{kinds.get(key, 'buffer')}/model.{key}", 0, tensor.flatten().clone())
            for key, tensor in model.state_dict().items()
        ]
        folder = folder_of(tmp_path / "run" / "checkpoints", 1)
        folder.mkdir(parents=True)
        files = {"rank_00000.safetensors": write_shard(folder / "rank_00000.safetensors", pieces)}
        facts = {"step": 1, "recipe": recipe.model_dump(mode="json")}
        write_manifest(folder, facts if recipe.classifier is None else facts | {"classes": CLASSES}, files)
        return tmp_path / "run", model.eval()

    return write


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A folder with one smooth image of 75 x 60 pixels."""
    folder = tmp_path_factory.mktemp("photo")
    x, y = torch.meshgrid(torch.linspace(0, 9, 60), torch.linspace(0, 12, 75), indexing="ij")
    pixels = torch.stack([x.sin() * y.cos(), (x + y).sin(), (x * y / 9).cos()], -1)
    Image.fromarray((127 + 120 * pixels).to(torch.uint8).numpy()).save(folder / "a.png")
    Image.open(folder / "a.png").save(folder / "a.jpg", quality=95)
    (folder / "a.png").unlink()
    return folder


def exported(call, run, out, layout) -> str:
    code, said, error = call("export", run, out, "--format", layout)
    assert code == 0, error
    return said


def opened(auto, folder):
    """The model that transformers makes of a folder; every tensor of the file was used, and no other is needed."""
    model, found = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def seen(photo: Path, side: int) -> torch.Tensor:
    """The image as our evaluation sees it [1, 3, S, S]."""
    recipe = load_recipe("demo", [f"model.image_size={side}"])
    return some_images(open_index(photo, progress=False), 1, recipe, augmentation("evaluation"))


def is_near(pixels: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether the same part of the image is seen, but for how libraries round (one grey level is 0.018)."""
    return pixels.shape == ours.shape and (pixels - ours).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("overrides", "norm"),
    [
        ([], True),
        (["model.target=pixels", "model.masking=block"], False),
        (NAMED, True),
    ],
)
@torch.inference_mode()
def test_transformers_opens_an_autoencoder_with_its_decoder(overrides, norm, checkpoint, photo, call, tmp_path):
    run, ours = checkpoint("demo", *overrides)
    out = tmp_path / "new" / "hf"
    assert "transformers' ViTMAEForPreTraining" in exported(call, run, out, "hf")
    theirs = opened(AutoModelForPreTraining, out)
    side = ours.image_size
    assert (theirs.config.norm_pix_loss, theirs.config.mask_ratio, theirs.config.image_size) == (norm, 0.6, side)
    images, noise = torch.randn(2, 3, side, side), torch.rand(2, ours.patches)
    mine, found = ours(images, noise), theirs(images, noise=noise)
    torch.testing.assert_close(found.logits, mine.prediction, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, mine.loss, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.mask, mine.mask)
    with Image.open(photo / "a.jpg") as picture:
        pixels = AutoImageProcessor.from_pretrained(out)(picture, return_tensors="pt")["pixel_values"]
    assert is_near(pixels, seen(photo, side))


@pytest.mark.parametrize("ablation", ["model.encoder_mask_tokens=true", "model.target=pca"])
@torch.inference_mode()
def test_a_decoder_that_transformers_does_not_have_is_left_out_and_said(ablation, checkpoint, call, tmp_path):
    run, ours = checkpoint("demo", ablation)
    assert "ViTMAEModel, the encoder over all patches" in exported(call, run, tmp_path / "hf", "hf")
    theirs = opened(AutoModel, tmp_path / "hf")
    images, noise = torch.randn(2, 3, 40, 40), torch.arange(25.0).expand(2, 25)  # no other order
    found = theirs(images, noise=noise).last_hidden_state
    torch.testing.assert_close(found, ours.forward_features(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("overrides", [CLS, [*CLS, "classifier.ema=0.99"], "probe"])
@torch.inference_mode()
def test_transformers_opens_a_classifier_with_its_labels(overrides, checkpoint, photo, call, tmp_path):
    name, overrides = ("probe/demo", CLS) if overrides == "probe" else ("scratch/demo", overrides)
    run, ours = checkpoint(name, *overrides)
    assert "transformers' ViTForImageClassification" in exported(call, run, tmp_path / "hf", "hf")
    theirs = opened(AutoModelForImageClassification, tmp_path / "hf")
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    assert theirs.config.label2id["owl"] == 3
    images = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(theirs(images).logits, ours(images), atol=1e-5, rtol=1e-5)
    with Image.open(photo / "a.jpg") as picture:
        pixels = AutoImageProcessor.from_pretrained(tmp_path / "hf")(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(theirs(pixels).logits, ours(seen(photo, 40)), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("demo", []),
        ("demo", NAMED),
        ("demo", ["model.encoder_mask_tokens=true"]),
        ("scratch/demo", CLS),
        ("scratch/demo", []),
        ("probe/demo", []),
    ],
)
@torch.inference_mode()
def test_timm_opens_a_folder_by_itself_and_with_checkpoint_path(name, overrides, checkpoint, photo, call, tmp_path):
    run, ours = checkpoint(name, *overrides)
    out, side = tmp_path / "timm", ours.image_size
    exported(call, run, out, "timm")
    config = json.loads((out / "config.json").read_text())
    assert not (out / "preprocessor_config.json").exists()
    images = torch.randn(2, 3, side, side)
    weights = out / "model.safetensors"
    for theirs in (
        timm.create_model(f"local-dir:{out}", pretrained=True),
        timm.create_model(f"local-dir:{out}", checkpoint_path=weights),
        timm.create_model(
            config["architecture"], checkpoint_path=weights, num_classes=config["num_classes"], **config["model_args"]
        ),
    ):
        theirs.eval()
        if name == "demo":
            torch.testing.assert_close(theirs.forward_features(images), ours.forward_features(images))
        else:
            torch.testing.assert_close(theirs(images), ours(images), atol=1e-5, rtol=1e-5)
            assert list(config["label_names"]) == CLASSES
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True)
    prepared = create_transform(**resolve_model_data_config(theirs))
    with Image.open(photo / "a.jpg") as picture:
        assert is_near(prepared(picture)[None], seen(photo, side))


@torch.inference_mode()
def test_a_mean_pooled_classifier_is_refused_for_hf_and_reaches_transformers_through_timm(checkpoint, call, tmp_path):
    run, ours = checkpoint("scratch/demo")
    code, _, error = call("export", run, tmp_path / "hf", "--format", "hf")
    assert (code, error.count("\n")) == (2, 1)
    assert "pools the mean of the patch tokens" in error
    assert not (tmp_path / "hf").exists()
    exported(call, run, tmp_path / "timm", "timm")
    theirs = opened(AutoModelForImageClassification, tmp_path / "timm")
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    images = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(theirs(images).logits, ours(images), atol=1e-5, rtol=1e-5)
    assert AutoImageProcessor.from_pretrained(tmp_path / "timm").data_config["input_size"] == (3, 40, 40)


def test_a_folder_is_written_again_but_other_weights_are_not_written_over(checkpoint, call, tmp_path):
    run, _ = checkpoint("demo")
    out = tmp_path / "model"
    exported(call, run, out, "hf")
    exported(call, run, out, "timm")
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    (run / "export").mkdir()
    (run / "export" / "model.safetensors").write_bytes(b"the run's own")
    for place, said in ((run / "export", "holds other weights"), (out / "config.json", "expected a folder")):
        code, _, error = call("export", run, place, "--format", "hf")
        assert (code, error.count("\n")) == (2, 1)
        assert said in error
    assert (run / "export" / "model.safetensors").read_bytes() == b"the run's own"
    (run / "export" / "model.safetensors").unlink()
    (run / "recipe.yaml").touch()
    code, _, error = call("export", run, run / "export", "--format", "hf")
    assert (code, "that the run itself leaves" in error) == (2, True)
    assert not any((run / "export").iterdir())
    exported(call, run, tmp_path / "one.safetensors", "hf")
    assert (tmp_path / "one.safetensors").is_file()


@pytest.mark.parametrize("name", SIZES)
def test_a_named_size_is_timms_architecture_of_that_size(name):
    with torch.device("meta"):
        ours = build_model(load_recipe("pretrain/vit_base_800ep", [f"model.name={name}", "model.image_size=224"]))
        _, config, state = model_folder._for_timm(ours, None)
        theirs = timm.create_model(config["architecture"], num_classes=0)
    assert config["architecture"] == f"{name}_224"
    assert {key: tensor.shape for key, tensor in theirs.state_dict().items()} == {
        key: tensor.shape for key, tensor in state.items()
    }
    assert theirs.blocks[0].attn.num_heads == config["model_args"]["num_heads"]
