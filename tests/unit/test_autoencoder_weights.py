"""Weights: three layouts read and written strictly, nothing unpickled."""

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.errors import UsageError
from mae_scale.models.mae import build_mae
from mae_scale.models.vit import Encoder, ViTSize
from mae_scale.models.weights.autoencoder import load_hf, load_official, load_timm, to_hf, to_official, to_timm
from mae_scale.models.weights.files import read_weights

LAYOUTS = {"official": (to_official, load_official), "hf": (to_hf, load_hf)}


def tiny(seed=0, **more):
    torch.manual_seed(seed)
    sizes = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
    return build_mae(None, **{**sizes, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, **more})


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bit_exact(layout):
    to, load = LAYOUTS[layout]
    model, other = tiny(0), tiny(1)
    written = to(model)
    report = load(other, written)
    assert same(other.state_dict(), model.state_dict())
    assert same(to(other), written)
    assert report.not_set == []
    assert len(report.loaded) == len(model.state_dict())


def test_official_names_and_shapes_are_the_releases():
    state = to_official(tiny())
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    expected = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    modules = ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    modules += [f"{where}.{part}" for where in ("blocks.0", "blocks.1", "decoder_blocks.0") for part in block]
    expected |= {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    assert set(state) == expected
    assert state["patch_embed.proj.weight"].shape == (32, 3, 8, 8)
    assert state["pos_embed"].shape == (1, 17, 32)
    assert state["decoder_pos_embed"].shape == (1, 17, 16)


def test_the_projection_of_a_file_is_the_convolution_it_was():
    model = tiny()
    state = to_official(model)
    images = torch.randn(2, 3, 32, 32)
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    expected = torch.nn.functional.conv2d(images, weight, bias, stride=8).flatten(2).transpose(1, 2)
    seen = []
    model.encoder.patch_embed.register_forward_hook(lambda module, args, output: seen.append(output))
    model.forward_features(images)
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["official", "hf", "timm"])
def test_a_file_without_decoder_leaves_the_decoder_as_it_was(layout):
    model, other = tiny(0), tiny(1)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    if layout == "timm":
        report = load_timm(other, to_timm(model))
    else:
        to, load = LAYOUTS[layout]
        report = load(other, to(model, decoder=False))
    assert report.not_set == [key for key in before if not key.startswith("encoder.")]
    for key, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[key] if key.startswith("encoder.") else before[key])


def test_an_encoder_alone_takes_a_whole_file_and_says_what_it_left():
    model = tiny()
    encoder = Encoder(ViTSize(patch_size=8, width=32, depth=2, heads=2), image_size=32)
    report = load_official(encoder, to_official(model))
    assert same(encoder.state_dict(), model.encoder.state_dict())
    assert "decoder_pred.weight" in report.unused
    assert same(to_timm(encoder), to_timm(model))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_unexpected_and_misshapen_tensors_are_listed_and_nothing_is_copied(layout):
    to, load = LAYOUTS[layout]
    model, other = tiny(0), tiny(1)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    state = to(model)
    lost = next(key for key in state if "fc1.bias" in key or "intermediate.dense.bias" in key)
    bent = next(key for key in state if "projection.bias" in key or "patch_embed.proj.bias" in key)
    del state[lost]
    state[bent] = torch.zeros(33)
    state["surplus"] = torch.zeros(1)
    with pytest.raises(UsageError) as refused:
        load(other, state)
    message = str(refused.value)
    assert "missing (1): blocks.0.mlp.fc1.bias" in message
    assert "unexpected (1): surplus" in message
    assert "patch_embed.proj.bias is [33], expected [32]" in message
    assert same(other.state_dict(), before)


def test_a_lost_query_is_missing_not_guessed():
    state = to_hf(tiny())
    del state["vit.encoder.layer.1.attention.attention.query.weight"]
    with pytest.raises(UsageError, match=r"blocks\.1\.attn\.qkv\.weight"):
        load_hf(tiny(), state)


def test_a_classifiers_file_is_named_as_such():
    state = to_timm(tiny())
    state |= {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    with pytest.raises(UsageError, match="classifier"):
        load_timm(tiny(), state)


def test_hugging_faces_classifier_is_named_as_such():
    state = to_hf(tiny(), decoder=False)
    state |= {"classifier.weight": torch.zeros(10, 32), "classifier.bias": torch.zeros(10)}
    with pytest.raises(UsageError, match="classifier's file"):
        load_hf(tiny(), state)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", [{"patch_size": 4}, {"width": 64}, {"depth": 3}])
def test_a_file_of_another_size_is_one_clear_error(layout, change):
    to, load = LAYOUTS[layout]
    sizes = {"patch_size": 8, "width": 32, "depth": 2, **change}
    found = "patch {patch_size} px, width {width}, {depth} blocks".format(**sizes)
    with pytest.raises(UsageError) as refused:
        load(tiny(), to(tiny(**change)))
    assert str(refused.value).startswith(f"these are weights of a ViT ({found}), this recipe's model is")
    assert "wrong shape" not in str(refused.value)


def test_hugging_faces_bare_encoder_is_read():
    model, other = tiny(0), tiny(1)
    state = to_hf(model, decoder=False)
    report = load_hf(other, {key.removeprefix("vit."): value for key, value in state.items()})
    assert all(key.startswith("encoder.") for key in report.loaded)
    assert same(other.encoder.state_dict(), model.encoder.state_dict())


def test_a_query_of_another_shape_is_missing():
    state = to_hf(tiny())
    state["vit.encoder.layer.1.attention.attention.query.weight"] = torch.zeros(32, 33)
    with pytest.raises(UsageError, match=r"blocks\.1\.attn\.qkv\.weight"):
        load_hf(tiny(), state)


def test_learned_positions_are_refused():
    state = to_official(tiny())
    state["pos_embed"] = state["pos_embed"] + 0.01
    with pytest.raises(UsageError, match="pos_embed"):
        load_official(tiny(), state)


def test_positions_are_exported_whole_from_a_bfloat16_model():
    assert torch.equal(to_official(tiny().bfloat16())["pos_embed"], to_official(tiny())["pos_embed"])


def test_mask_tokens_in_the_encoder_have_no_foreign_layout_but_their_encoder_has():
    model = tiny(encoder_mask_tokens=True)
    with pytest.raises(UsageError, match="decoder=False"):
        to_official(model)
    with pytest.raises(UsageError, match="encoder_mask_tokens"):
        load_official(model, to_official(tiny()))
    plain = tiny(1)
    load_timm(plain, to_timm(model))
    assert torch.equal(plain.encoder.cls_token, model.encoder.cls_token)


def test_hugging_faces_own_files_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
    )
    theirs = transformers.ViTMAEForPreTraining(config)
    with torch.no_grad():  # some versions of transformers leave a fresh model's positions zero
        theirs.vit.embeddings.position_embeddings.copy_(to_official(tiny())["pos_embed"])
        theirs.decoder.decoder_pos_embed.copy_(to_official(tiny())["decoder_pos_embed"])
    theirs.save_pretrained(tmp_path)
    ours, live = tiny(0), tiny(1)
    load_hf(ours, read_weights(tmp_path / "model.safetensors"))
    load_hf(live, theirs.state_dict())
    assert same(ours.state_dict(), live.state_dict())
    save_file(to_hf(ours), tmp_path / "model.safetensors", metadata={"format": "pt"})
    back = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path)
    assert same(back.state_dict(), theirs.state_dict())
