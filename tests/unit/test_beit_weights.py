"""Weights of BEiT beside transformers' and timm's models: read in every layout, written so that they read them."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.beit import Beit as TimmBeit
from timm.models.beit import checkpoint_filter_fn
from torch.nn import functional
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitModel,
)

import mae_scale
from data_pipeline.errors import UsageError
from mae_scale.checkpoints.model_folder import export_folder
from mae_scale.models.attention import last_attention
from mae_scale.models.beit import TABLE, Beit
from mae_scale.models.classifier import Classifier, build_classifier
from mae_scale.models.vit import ViTSize
from mae_scale.models.weights.beit import beit_release_names, beit_to_hf, beit_to_official, beit_to_timm, load_beit
from mae_scale.models.weights.classifier import _CLASSIFIER as CLASSIFIER
from mae_scale.models.weights.classifier import classifier_to_timm, load_classifier
from mae_scale.models.weights.layouts import from_release
from tests.unit.test_classifier_weights import shaken

SIZE, IMAGE, WORDS, CLASSES = ViTSize(patch_size=8, width=32, depth=2, heads=4), 32, 50, 10
SIZES = {"patch_size": 8, "width": 32, "depth": 2, "heads": 4, "layer_scale": 0.1}


def config(**more) -> BeitConfig:
    return BeitConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        layer_norm_eps=1e-6,
        image_size=IMAGE,
        patch_size=8,
        use_absolute_position_embeddings=False,
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **more,
    )


def hf_classifier(pool: str = "mean") -> BeitForImageClassification:
    settings = {"use_relative_position_bias": True, "use_mean_pooling": pool == "mean", "num_labels": CLASSES}
    return shaken(BeitForImageClassification(config(**settings)))


def timm_classifier(pool: str = "avg", image_size: int = IMAGE, **more) -> TimmBeit:
    sizes = {"img_size": image_size, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "init_values": 0.1}
    positions = {"use_abs_pos_emb": False, "use_rel_pos_bias": True}
    return shaken(TimmBeit(**sizes, **positions, global_pool=pool, **{"num_classes": CLASSES} | more))


def ours(pool: str = "mean", image_size: int = IMAGE, **more) -> Classifier:
    torch.manual_seed(1)
    return build_classifier(**SIZES, **{"classes": CLASSES} | more, image_size=image_size, pool=pool).eval()


def pretrained(**more) -> Beit:
    return shaken(Beit(SIZE, image_size=IMAGE, words=WORDS, layer_scale=0.1, **more))


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_logits_and_gradients_of_a_classifier_are_transformers(pool, images):
    peer, model = hf_classifier(pool), ours(pool)
    report = load_classifier(model, peer.state_dict())
    assert not report.not_set
    assert not report.unused
    labels = torch.tensor([1, 5, 9])
    expected, found = peer(images).logits, model(images)
    close(found, expected)
    for logits in (expected, found):
        functional.cross_entropy(logits, labels).backward()
    gradients = {name: parameter.grad for name, parameter in peer.named_parameters()}
    gradients = from_release(beit_release_names(gradients), CLASSIFIER)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5 * scale + 1e-7, rtol=1e-4)


def test_files_on_the_hub_have_the_older_names_and_are_read_too(images):
    model = pretrained()
    state = beit_to_hf(model)
    assert {
        "beit.embeddings.mask_token",
        f"beit.encoder.relative_position_bias.{TABLE}",
        "beit.encoder.layer.0.attention.attention.query.bias",
        "beit.encoder.layer.1.attention.output.dense.weight",
        "beit.encoder.layer.1.lambda_2",
        "layernorm.weight",
        "lm_head.bias",
    } <= state.keys()
    other = Beit(SIZE, image_size=IMAGE, words=WORDS, layer_scale=0.1).eval()
    load_beit(other, state | {"beit.encoder.relative_position_bias.relative_position_index": torch.zeros(1)})
    mask = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) < 0.3
    words = torch.ones(3, 16, dtype=torch.int64)
    assert all(map(torch.equal, model(images, mask, words), other(images, mask, words)))


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_a_folder_of_a_classifier_is_what_transformers_opens(pool, images, tmp_path):
    model = shaken(ours(pool))
    assert export_folder(model, None, tmp_path / "hf", "hf") == "transformers' BeitForImageClassification"
    peer = AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    close(peer(images).logits, model(images))


def test_a_folder_of_a_pre_trained_model_is_what_transformers_opens(images, tmp_path):
    model = pretrained()
    assert export_folder(model, None, tmp_path / "hf", "hf") == "transformers' BeitForMaskedImageModeling"
    peer, loading = BeitForMaskedImageModeling.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values())
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, :5] = True
    found = peer.eval()(images, bool_masked_pos=mask).logits[mask].view(3, 5, WORDS)
    close(model(images, mask, torch.ones(3, 16).long())[1][:, :5], found)


@pytest.mark.parametrize("model", [ours, pretrained])
def test_a_folder_for_timm_is_what_timm_opens(model, images, tmp_path):
    model = shaken(model())
    export_folder(model, None, tmp_path / "timm", "timm")
    peer = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    expected = model(images) if isinstance(model, Classifier) else model.features(images)
    close(peer(images) if isinstance(model, Classifier) else peer.forward_features(images), expected)


def test_timms_fine_tuned_weights_are_read_and_written(images):
    peer, model = timm_classifier(), ours()
    load_classifier(model, peer.state_dict())
    close(model(images), peer(images))
    assert all(torch.equal(value, peer.state_dict()[key]) for key, value in classifier_to_timm(model).items())


def test_a_classifier_takes_copies_of_the_shared_table(images):
    source, model = pretrained(), ours("cls")
    for state in (source.state_dict(), beit_to_official(source), beit_to_hf(source), beit_to_timm(source)):
        report = load_classifier(model, state)
        assert set(report.not_set) == {"head.weight", "head.bias"}
        close(model.features(images), source.features(images)[:, 0])
    assert sum(key.endswith(TABLE) for key in model.state_dict()) == SIZE.depth
    report = load_classifier(ours("mean"), beit_to_official(source))
    assert sorted(report.unused) == ["lm_head.bias", "lm_head.weight", "mask_token", "norm.bias", "norm.weight"]


def test_at_another_size_tables_are_resampled_as_timms(images):
    small, large = timm_classifier(), timm_classifier(image_size=48)
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
    model = ours(image_size=48)
    load_classifier(model, small.state_dict())
    larger = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    close(model(larger), large(larger))
    assert not torch.allclose(large(larger), timm_classifier(image_size=48, num_classes=CLASSES)(larger))


def test_load_encoder_reads_a_file_of_any_layout(images, tmp_path):
    source = pretrained()
    for name, state in {"official": beit_to_official(source), "hf": beit_to_hf(source)}.items():
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / f"{name}.safetensors")
        encoder = mae_scale.load_encoder(tmp_path / f"{name}.safetensors", heads=4)
        assert (encoder.image_size, encoder.size) == (IMAGE, SIZE)
        close(encoder.forward_features(images), source.features(images))
    bare = shaken(BeitModel(config(use_relative_position_bias=True, use_mean_pooling=False)))
    save_file(bare.state_dict(), tmp_path / "bare.safetensors")
    encoder = mae_scale.load_encoder(tmp_path / "bare.safetensors", heads=4)
    close(encoder.forward_features(images), bare(images).last_hidden_state)


def test_the_attention_of_a_figure_is_transformers(images):
    for pool in ("mean", "cls"):
        peer, model = hf_classifier(pool), ours(pool)
        load_classifier(model, peer.state_dict())
        peer.set_attn_implementation("eager")
        attention = peer(images, output_attentions=True).attentions[-1]
        expected = attention[:, :, 1:].mean(2) if pool == "mean" else attention[:, :, 0]
        close(last_attention(model, images), expected[..., 1:])


@pytest.mark.parametrize(
    ("model", "state", "says"),
    [
        (lambda: build_classifier(classes=10, image_size=32, patch_size=8, width=32, depth=2, heads=4), pretrained,
         "weights of a BEiT, and the recipe has model.encoder=vit"),
        (ours, lambda: build_classifier(classes=10, image_size=32, patch_size=8, width=32, depth=2, heads=4),
         "no weights of a BEiT .* model.encoder=beit"),
        (lambda: ours("cls"), ours, "set classifier.pool=mean"),
        (lambda: ours(classes=7), ours, "head has 10 classes, the data 7"),
        (ours, lambda: Beit(ViTSize(8, 32, 3, 4), image_size=32, words=5, layer_scale=0.1), "3 blocks"),
    ],
)  # fmt: skip
def test_weights_of_another_model_are_refused_in_one_line(model, state, says):
    with pytest.raises(UsageError, match=says) as refused:
        load_classifier(model(), state().state_dict())
    assert "\n" not in str(refused.value)


def test_pre_training_takes_no_file_without_its_head():
    with pytest.raises(UsageError, match=r"missing \(\d+\): .*lm_head.weight.*BeitForMaskedImageModeling"):
        load_beit(pretrained(), ours().state_dict())
