"""Weights of a classifier: read in every layout, written in those that others read, equal to what they compute."""

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from data_pipeline.errors import UsageError
from mae_scale.models.classifier import build_classifier
from mae_scale.models.mae import build_mae
from mae_scale.models.vit import parameter_count
from mae_scale.models.weights.autoencoder import load_official, to_hf, to_official, to_timm
from mae_scale.models.weights.classifier import (
    classifier_to_hf,
    classifier_to_official,
    classifier_to_timm,
    load_classifier,
)
from mae_scale.models.weights.files import read_weights

SIZES = {"patch_size": 8, "width": 32, "depth": 2, "heads": 2}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
TIMM_POOL = {"mean": "avg", "cls": "token"}


def shaken(model, seed=0):
    """Every number drawn anew, so that no bias, norm or position can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def ours(pool="mean", image_size=32, **more):
    torch.manual_seed(1)
    return build_classifier(**{**SIZES, "classes": 10, "image_size": image_size, "pool": pool, **more}).eval()


def autoencoder(**more):
    return shaken(build_mae(None, image_size=32, **{**SIZES, **DECODER, **more}))


def peer_timm(pool="mean", *, classes=10, image_size=32, patch_size=8, seed=2):
    sizes = {"patch_size": patch_size, "embed_dim": 32, "depth": 2, "num_heads": 2}
    peer = VisionTransformer(img_size=image_size, num_classes=classes, global_pool=TIMM_POOL[pool], **sizes)
    return shaken(peer, seed)


def peer_hf(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    sizes |= {"image_size": 32, "patch_size": 8}
    if kind == "ViTForImageClassification":
        config = transformers.ViTConfig(**sizes, layer_norm_eps=1e-6, num_labels=10)
    else:
        decoder = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64}
        decoder = {f"decoder_{key}": value for key, value in decoder.items()}
        config = transformers.ViTMAEConfig(**sizes, **decoder, layer_norm_eps=1e-6, mask_ratio=0.0)
    return shaken(getattr(transformers, kind)(config))


def hf_states(peer, folder):
    """As the module names its tensors, and as it writes them."""
    peer.save_pretrained(folder)
    return peer.state_dict(), read_weights(folder / "model.safetensors")


def pictures(side=32):
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(7))


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("pool", ["mean", "cls"])
@torch.no_grad()
def test_a_fine_tuned_file_gives_the_logits_of_timm_both_ways(pool):
    peer, model = peer_timm(pool), ours(pool)
    report = load_classifier(model, peer.state_dict())
    assert (report.not_set, report.unused) == ([], [])
    assert set(report.loaded) == set(model.state_dict())
    close(model(pictures()), peer(pictures()))
    for written in (classifier_to_official(model), classifier_to_timm(model)):
        assert same(written, dict(peer.state_dict()))
        back = peer_timm(pool, seed=3)
        back.load_state_dict(written, strict=True)
        close(back(pictures()), model(pictures()))


@pytest.mark.parametrize("pool", ["mean", "cls"])
@torch.no_grad()
def test_a_pre_trained_file_gives_the_features_of_timm(pool):
    peer = peer_timm("cls", classes=0)
    model = ours(pool)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_classifier(model, peer.state_dict())
    kinds = ("fc_norm", "head") if pool == "mean" else ("head",)
    assert report.not_set == [f"{kind}.{part}" for kind in kinds for part in ("weight", "bias")]
    assert report.unused == (["norm.weight", "norm.bias"] if pool == "mean" else [])
    assert all(torch.equal(model.state_dict()[key], fresh[key]) for key in report.not_set)
    if pool == "mean":
        peer.norm = torch.nn.Identity()
        expected = torch.nn.functional.layer_norm(peer.forward_features(pictures())[:, 1:].mean(1), [32], eps=1e-6)
    else:
        expected = peer(pictures())
    close(model.features(pictures()), expected)


@pytest.mark.parametrize("kind", ["ViTMAEModel", "ViTMAEForPreTraining"])
@torch.no_grad()
def test_hugging_faces_autoencoder_gives_its_features(kind, tmp_path):
    peer = peer_hf(kind)
    for state in hf_states(peer, tmp_path):
        encoded = getattr(peer, "vit", peer)(pictures(), output_hidden_states=True)  # all patches, in random order
        model = ours("cls")
        report = load_classifier(model, state)
        assert report.not_set == ["head.weight", "head.bias"]
        assert bool(report.unused) == (kind == "ViTMAEForPreTraining")
        assert all(key.startswith(("decoder_", "mask_token")) for key in report.unused)
        close(model.features(pictures()), encoded.last_hidden_state[:, 0])
        model = ours("mean")
        assert {"norm.weight", "norm.bias"} <= set(load_classifier(model, state).unused)
        pooled = encoded.hidden_states[-1][:, 1:].mean(1)
        close(model.features(pictures()), torch.nn.functional.layer_norm(pooled, [32], eps=1e-6))


@torch.no_grad()
def test_hugging_faces_classifier_gives_its_logits_both_ways(tmp_path):
    peer = peer_hf("ViTForImageClassification")
    live, written = hf_states(peer, tmp_path)
    for state in (live, written):
        model = ours("cls")
        report = load_classifier(model, state)
        assert (report.not_set, report.unused) == ([], [])
        close(model(pictures()), peer(pictures()).logits)
    assert same(classifier_to_hf(model), written)
    save_file(classifier_to_hf(model), tmp_path / "model.safetensors", metadata={"format": "pt"})
    back = type(peer).from_pretrained(tmp_path)
    assert same(back.state_dict(), live)


def test_hugging_faces_classifier_cannot_pool_by_mean():
    with pytest.raises(UsageError, match=r"mean .* export it in the layout official or timm"):
        classifier_to_hf(ours("mean"))


@pytest.mark.parametrize("pool", ["mean", "cls"])
@torch.no_grad()
def test_a_probes_batch_norm_is_folded_into_the_head(pool):
    model = shaken(ours(pool, batch_norm=True, trained_blocks=0))
    model.batch_norm.running_mean.normal_()
    model.batch_norm.running_var.uniform_(0.1, 3.0)
    peer = peer_timm(pool)
    peer.load_state_dict(classifier_to_timm(model), strict=True)
    close(peer(pictures()), model(pictures()))
    folded = ours(pool)
    load_classifier(folded, classifier_to_official(model))
    close(folded(pictures()), model(pictures()))


PRE_TRAINED = {
    "official": to_official,
    "encoder": lambda model: to_official(model, decoder=False),
    "timm": to_timm,
    "hf": to_hf,
    "ours": lambda model: {**model.state_dict(), "encoder.pos_embed": model.encoder.pos_embed},
}


@pytest.mark.parametrize("layout", PRE_TRAINED)
def test_every_layout_of_an_autoencoder_gives_the_same_encoder_bit_for_bit(layout):
    source, model = autoencoder(), ours("cls")
    report = load_classifier(model, PRE_TRAINED[layout](source))
    assert report.not_set == ["head.weight", "head.bias"]
    written = classifier_to_official(model)
    assert same({key: value for key, value in written.items() if "head" not in key}, to_timm(source))


@pytest.mark.parametrize("more", [{}, {"target": "pca", "encoder_mask_tokens": True}])
def test_our_autoencoder_leaves_the_positions_and_its_head_is_not_the_classifiers(more):
    source = autoencoder(**more)
    model = ours("cls", classes=source.head.out_features)
    report = load_classifier(model, source.state_dict())
    assert report.not_set == ["encoder.pos_embed", "head.weight", "head.bias"]
    assert torch.equal(model.encoder.pos_embed, source.encoder.pos_embed)
    assert {"decoder_pred.weight", "decoder_pred.bias"} <= set(report.unused)
    assert all(torch.equal(model.state_dict()[key], source.state_dict()[key]) for key in report.loaded)


@pytest.mark.parametrize("more", [{}, {"pool": "cls"}, {"batch_norm": True, "trained_blocks": 0}])
def test_our_own_classifier_is_read_whole(more):
    source, model = shaken(ours(**more)), ours(**more)
    report = load_classifier(model, source.state_dict())
    assert (report.not_set, report.unused) == ([], [])
    assert same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("patch_size", [16, 14])
@torch.no_grad()
def test_positions_of_224_px_are_resampled_to_448_px_as_the_authors_and_timm_do(patch_size):
    file = peer_timm("mean", image_size=224, patch_size=patch_size).state_dict()
    peer = peer_timm("mean", image_size=448, patch_size=patch_size)
    peer.load_state_dict(checkpoint_filter_fn(dict(file), peer, antialias=False), strict=True)
    model = ours("mean", image_size=448, patch_size=patch_size)
    load_classifier(model, file)
    grid = 224 // patch_size
    square = file["pos_embed"][:, 1:].reshape(1, grid, grid, 32).permute(0, 3, 1, 2)
    finer = torch.nn.functional.interpolate(square, size=2 * grid, mode="bicubic", align_corners=False)
    finer = finer.permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.equal(model.encoder.pos_embed, torch.cat([file["pos_embed"][0, :1], finer]))
    close(model(pictures(448)), peer(pictures(448)))


def test_positions_of_half_precision_are_resampled_in_float32():
    file = {key: value.bfloat16() for key, value in peer_timm("mean").state_dict().items()}
    model, exact = ours("mean", image_size=64), ours("mean", image_size=64)
    load_classifier(model, file)
    load_classifier(exact, {key: value.float() for key, value in file.items()})
    assert torch.equal(model.encoder.pos_embed, exact.encoder.pos_embed)


def refused(model, state, *texts):
    """The one line that says why, every text in it; the model is as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UsageError) as error:
        load_classifier(model, state)
    message = str(error.value)
    assert "\n" not in message
    assert [text for text in texts if text not in message] == [], message
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("change", [{"patch_size": 4}, {"width": 64}, {"depth": 3}])
def test_a_file_of_another_size_is_one_clear_error(change):
    source = autoencoder(**change)
    found, own = (
        f"(patch {s['patch_size']} px, width {s['width']}, {s['depth']} blocks)" for s in (SIZES | change, SIZES)
    )
    for write in PRE_TRAINED.values():
        refused(ours(), write(source), f"weights of a ViT {found}", f"model is a ViT {own}")


def test_known_sizes_are_called_by_their_names():
    with torch.device("meta"):
        model = build_classifier("vit_base_patch16", classes=1000)
    with pytest.raises(UsageError) as error:
        load_classifier(model, meta(published(16, 1024, 24, patches=196, norm="norm")))
    assert str(error.value).startswith(
        "these are weights of vit_large_patch16 (patch 16 px, width 1024, 24 blocks), "
        "this recipe's model is vit_base_patch16 (patch 16 px, width 768, 12 blocks): "
    )


def test_a_head_of_other_classes_is_refused_with_both_numbers():
    refused(ours(), peer_timm(classes=12).state_dict(), "the file's head has 12 classes, the data 10", "without a head")


def test_a_classifier_of_the_other_pooling_is_refused():
    refused(ours("cls"), peer_timm("mean").state_dict(), "pools by mean", "set classifier.pool=mean")
    refused(ours("mean"), peer_timm("cls").state_dict(), "pools by cls", "set classifier.pool=cls")
    refused(ours("cls"), peer_timm("mean", classes=0).state_dict(), "set classifier.pool=mean")


def test_a_probes_batch_norm_needs_its_place_but_may_stay_fresh():
    probe = ours(batch_norm=True, trained_blocks=0)
    refused(ours(), probe.state_dict(), "BatchNorm", "classifier.batch_norm=true")
    report = load_classifier(probe, peer_timm().state_dict())
    assert report.not_set == ["batch_norm.running_mean", "batch_norm.running_var"]


@pytest.mark.parametrize("key", ["cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.0.mlp.fc1.bias"])
def test_what_the_encoder_needs_must_be_there_with_its_shape(key):
    state = dict(peer_timm().state_dict())
    value = state.pop(key)
    refused(ours(), state, f"missing (1): {key}")
    bent = torch.zeros(2, *value.shape)
    refused(ours(), {**state, key: bent}, f"{key} is {list(bent.shape)}, expected {list(value.shape)}")


@pytest.mark.parametrize(("pool", "key"), [("cls", "norm.weight"), ("mean", "head.bias"), ("mean", "fc_norm.bias")])
def test_half_a_norm_or_head_is_not_enough(pool, key):
    state = {name: value for name, value in peer_timm(pool).state_dict().items() if name != key}
    refused(ours(pool), state, f"missing (1): {key}")


def test_the_cls_token_needs_the_pre_trained_norm():
    state = {key: value for key, value in to_timm(autoencoder()).items() if not key.startswith("norm.")}
    refused(ours("cls"), state, "missing (2): norm.weight, norm.bias")
    assert load_classifier(ours("mean"), state).unused == []


@pytest.mark.parametrize("key", ["reg_token", "norm.weight", "head_dist.weight", "blocks.0.ls1.gamma"])
def test_other_models_parts_are_listed(key):
    refused(ours(), {**peer_timm().state_dict(), key: torch.zeros(32)}, f"unexpected (1): {key}")


def test_files_of_other_architectures_are_refused():
    state = {**peer_timm().state_dict(), "pos_embed": torch.zeros(1, 16, 32)}
    refused(ours(), state, "pos_embed is [1, 16, 32], expected [1, 17, 32]")
    refused(ours(), {"conv1.weight": torch.zeros(64, 3, 7, 7)}, "unexpected (1): conv1.weight", "missing (")


# Below, files as published: their names and shapes written out here, not asked of the code under test.
# Patch, width, depth.
RELEASES = {"vit_base_patch16": (16, 768, 12), "vit_large_patch16": (16, 1024, 24), "vit_huge_patch14": (14, 1280, 32)}


def published(patch, width, depth, *, patches, norm, classes=None, decoder=False):
    """Shapes by name of mae_pretrain_vit_*.pth (norm), mae_visualize_vit_*.pth (decoder too) and
    mae_finetuned_vit_*.pth (norm="fc_norm", classes)."""

    def linear(name, rows, columns):
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def normed(name, size):
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    def blocks(name, size, count):
        shapes = {}
        for block in (f"{name}.{number}" for number in range(count)):
            shapes |= normed(f"{block}.norm1", size) | normed(f"{block}.norm2", size)
            shapes |= linear(f"{block}.attn.qkv", 3 * size, size) | linear(f"{block}.attn.proj", size, size)
            shapes |= linear(f"{block}.mlp.fc1", 4 * size, size) | linear(f"{block}.mlp.fc2", size, 4 * size)
        return shapes

    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + patches, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,)}
    shapes |= blocks("blocks", width, depth) | normed(norm, width)
    if decoder:
        shapes |= {"mask_token": (1, 1, 512), "decoder_pos_embed": (1, 1 + patches, 512)}
        shapes |= linear("decoder_embed", 512, width) | blocks("decoder_blocks", 512, 8)
        shapes |= normed("decoder_norm", 512) | linear("decoder_pred", 3 * patch * patch, 512)
    return shapes | (linear("head", classes, width) if classes else {})


def meta(shapes):
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("name", RELEASES)
def test_pre_trained_files_of_true_size_fit(name, decoder):
    patch, width, depth = RELEASES[name]
    state = meta(published(patch, width, depth, patches=(224 // patch) ** 2, norm="norm", decoder=decoder))
    left = {key for key in state if key.startswith(("decoder_", "mask_token"))}
    for pool, image_size in (("mean", 224), ("cls", 224), ("mean", 448)):
        with torch.device("meta"):
            model = build_classifier(name, classes=1000, pool=pool, image_size=image_size)
        report = load_classifier(model, state)
        assert set(report.unused) == left | ({"norm.weight", "norm.bias"} if pool == "mean" else set())
        assert {key.split(".")[0] for key in report.not_set} == {"head"} | ({"fc_norm"} if pool == "mean" else set())
    with torch.device("meta"):
        model = build_mae(name)
    report = load_official(model, state)
    assert set(report.loaded) >= {key for key, _ in model.named_parameters() if decoder or key.startswith("encoder.")}


@pytest.mark.parametrize(
    ("name", "image_size", "count", "millions"),
    [
        ("vit_base_patch16", 224, 86_567_656, 86.57),
        ("vit_large_patch16", 224, 304_326_632, 304.33),
        ("vit_huge_patch14", 224, 632_045_800, 632.04),
        ("vit_huge_patch14", 448, 633_028_840, 633.03),
    ],
)
def test_fine_tuned_files_of_true_size_have_the_published_number_of_parameters(name, image_size, count, millions):
    patch, width, depth = RELEASES[name]
    patches = (image_size // patch) ** 2
    state = meta(published(patch, width, depth, patches=patches, norm="fc_norm", classes=1000))
    with torch.device("meta"):
        model = build_classifier(name, classes=1000, image_size=image_size)
    report = load_classifier(model, state)
    assert (report.not_set, report.unused) == ([], [])
    assert sum(value.numel() for value in state.values()) == parameter_count(model) == count
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_files_of_vit_base_are_read_from_disk_and_loaded_bit_for_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for fine_tuned in (True, False):
        more = {"norm": "fc_norm", "classes": 1000} if fine_tuned else {"norm": "norm", "decoder": True}
        shapes = published(16, 768, 12, patches=196, **more)
        written = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        torch.save({"model": written}, tmp_path / "file.pth")
        model = build_classifier("vit_base_patch16", classes=1000, pool="mean" if fine_tuned else "cls")
        report = load_classifier(model, read_weights(tmp_path / "file.pth"))
        assert report.not_set == ([] if fine_tuned else ["head.weight", "head.bias"])
        exported = classifier_to_official(model)
        kept = [key for key in written if key not in report.unused]
        assert all(torch.equal(exported[key], written[key]) for key in kept)
        assert set(kept) == set(exported) - set(report.not_set)
