"""ViTDet's layout: detectron2's names and shapes, and its arithmetic written anew, beside our Mask R-CNN."""

import math
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList

from data_pipeline.errors import UsageError
from mae_scale.models.dense import DenseEncoder
from mae_scale.models.detector import MaskRcnn
from mae_scale.models.vit import SIZES, ViTSize
from mae_scale.models.weights.files import read_weights
from mae_scale.models.weights.vitdet import detector_to_vitdet, load_vitdet

CLASSES, CHANNELS, SIDE, WINDOW, PATCH, HEADS = 3, 16, 80, 2, 16, 2
TINY = ViTSize(patch_size=PATCH, width=32, depth=2, heads=HEADS)


def detector(size=TINY, classes=CLASSES, channels=CHANNELS, **more) -> MaskRcnn:
    settings = {"image_size": (SIDE, SIDE), "pretraining_size": 32, "window": WINDOW, "global_blocks": (1,)}
    return MaskRcnn(DenseEncoder(size, **settings | more), classes=classes, channels=channels).eval()


def published(size=TINY, classes=CLASSES, c=CHANNELS, *, grid=2, side=SIDE // PATCH, window=WINDOW, global_blocks=(1,)):
    """The names and shapes of detectron2's configuration, from its source."""
    d, p, net = size.width, size.patch_size, "backbone.net."
    found = {f"{net}pos_embed": [1, 1 + grid**2, d], f"{net}patch_embed.proj.weight": [d, 3, p, p]}
    found[f"{net}patch_embed.proj.bias"] = [d]
    for number in range(size.depth):
        n = side if number in global_blocks else window
        for name, shape in {
            "attn.qkv": [3 * d, d],
            "attn.proj": [d, d],
            "mlp.fc1": [4 * d, d],
            "mlp.fc2": [d, 4 * d],
            "norm1": [d],
            "norm2": [d],
        }.items():
            found[f"{net}blocks.{number}.{name}.weight"] = shape
            found[f"{net}blocks.{number}.{name}.bias"] = shape[:1]
        for axis in "hw":
            found[f"{net}blocks.{number}.attn.rel_pos_{axis}"] = [2 * n - 1, d // size.heads]
    for name, shape in {
        "2.0": [d, d // 2, 2, 2],
        "2.3": [d // 2, d // 4, 2, 2],
        "3.0": [d, d // 2, 2, 2],
    }.items():
        found[f"backbone.simfp_{name}.weight"], found[f"backbone.simfp_{name}.bias"] = shape, shape[1:2]
    found["backbone.simfp_2.1.weight"] = found["backbone.simfp_2.1.bias"] = [d // 2]
    for name, shape in {
        **{"2.4": [c, d // 4, 1, 1], "3.1": [c, d // 2, 1, 1], "4.0": [c, d, 1, 1], "5.1": [c, d, 1, 1]},
        **{place: [c, c, 3, 3] for place in ("2.5", "3.2", "4.1", "5.2")},
    }.items():
        found |= normalised(f"backbone.simfp_{name}", shape)
    for number in range(1, 5):
        found |= normalised(f"roi_heads.box_head.conv{number}", [c, c, 3, 3])
        found |= normalised(f"roi_heads.mask_head.mask_fcn{number}", [c, c, 3, 3])
    for name, shape in {
        "proposal_generator.rpn_head.conv.conv0": [c, c, 3, 3],
        "proposal_generator.rpn_head.conv.conv1": [c, c, 3, 3],
        "proposal_generator.rpn_head.objectness_logits": [3, c, 1, 1],
        "proposal_generator.rpn_head.anchor_deltas": [12, c, 1, 1],
        "roi_heads.box_head.fc1": [4 * c, 49 * c],
        "roi_heads.box_predictor.cls_score": [classes + 1, 4 * c],
        "roi_heads.box_predictor.bbox_pred": [4 * classes, 4 * c],
        "roi_heads.mask_head.deconv": [c, c, 2, 2],
        "roi_heads.mask_head.predictor": [classes, c, 1, 1],
    }.items():
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]
    return found


def normalised(name, shape):
    """A convolution without a bias and its LayerNorm."""
    return {f"{name}.weight": shape, f"{name}.norm.weight": shape[:1], f"{name}.norm.bias": shape[:1]}


@pytest.fixture(scope="module")
def weights():
    """Random weights in detectron2's layout, neither too large nor too small to tell layers apart."""
    draws = torch.Generator().manual_seed(3)
    found = {}
    for name, shape in published().items():
        spread = 0.5 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
        found[name] = torch.randn(shape, generator=draws) * spread
    return found


@pytest.fixture
def model(weights):
    torch.manual_seed(1)
    made = detector()
    load_vitdet(made, weights)
    return made


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[key], expected[key]) for key in expected)


def test_names_and_shapes_of_vit_b_are_detectron2s():
    grid, blocks = 224 // 16, (2, 5, 8, 11)
    with torch.device("meta"):
        settings = {"image_size": (1024, 1024), "pretraining_size": 224, "window": 14, "global_blocks": blocks}
        made = detector(SIZES["vit_base_patch16"], 80, 256, **settings)
    expected = published(SIZES["vit_base_patch16"], 80, 256, grid=grid, side=64, window=14, global_blocks=blocks)
    found = {key: list(value.shape) for key, value in detector_to_vitdet(made).items()}
    assert found == expected


def test_weights_go_in_and_out_bit_for_bit(weights, model):
    written = detector_to_vitdet(model)
    assert written["backbone.net.pos_embed"][0, 0].eq(0).all()  # no forward reads the cls token's
    own = weights | {"backbone.net.pos_embed": weights["backbone.net.pos_embed"].clone()}
    own["backbone.net.pos_embed"][0, 0] = 0
    assert same(written, own)
    torch.manual_seed(2)
    other = detector()
    report = load_vitdet(other, written)
    assert same(other.state_dict(), model.state_dict())
    assert set(report.loaded) == set(model.state_dict())
    assert report.not_set == report.unused == []
    written["backbone.net.pos_embed"].zero_()
    assert not model.encoder.pos_embed.eq(0).all()


def test_detections_are_those_of_the_model_that_was_written():
    torch.manual_seed(4)
    source, other = detector(), detector()
    images = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))
    load_vitdet(other, detector_to_vitdet(source))
    with torch.no_grad():
        (expected,), (found,) = (made.detect(images, [(SIDE, SIDE)]) for made in (source, other))
    assert len(expected["boxes"])
    assert same(found, expected)


def layer_norm(x, weights, name, dim):
    """Over dimension `dim`, with detectron2's epsilon."""
    mean = x.mean(dim, keepdim=True)
    variance = (x - mean).square().mean(dim, keepdim=True)
    shape = [-1 if axis == dim % x.ndim else 1 for axis in range(x.ndim)]
    scale, shift = (weights[f"{name}.{part}"].view(shape) for part in ("weight", "bias"))
    return (x - mean) / (variance + 1e-6).sqrt() * scale + shift


def linear(x, weights, name):
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def attention(x, weights, name):
    """x [n, h, w, D]; every query and key one by one."""
    n, h, w, dim = x.shape
    qkv = linear(x, weights, f"{name}.qkv").view(n, h * w, 3, HEADS, dim // HEADS)
    q, k, v = (qkv[:, :, part].transpose(1, 2) for part in range(3))  # [n, heads, hw, d]
    rows, columns = (torch.arange(h * w) // w, torch.arange(h * w) % w)
    scores = q @ k.transpose(-2, -1) / math.sqrt(dim // HEADS)
    for axis, place, length in (("h", rows, h), ("w", columns, w)):
        table = weights[f"{name}.rel_pos_{axis}"]
        relative = table[place[:, None] - place[None] + length - 1]  # [hw, hw, d]
        scores = scores + (q[:, :, :, None] * relative).sum(-1)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, h, w, dim)
    return linear(mixed, weights, f"{name}.proj")


def attention_of_block(x, weights, name, *, windowed):
    if not windowed:
        return attention(x, weights, name)
    h, w = x.shape[1:3]
    filled = functional.pad(x, (0, 0, 0, -w % WINDOW, 0, -h % WINDOW))
    found = torch.empty_like(filled)
    for top in range(0, filled.shape[1], WINDOW):
        for left in range(0, filled.shape[2], WINDOW):
            part = (slice(None), slice(top, top + WINDOW), slice(left, left + WINDOW))
            found[part] = attention(filled[part], weights, name)
    return found[:, :h, :w]


def encoded(images, weights):
    net = "backbone.net."
    weights = {key.removeprefix(net): value for key, value in weights.items() if key.startswith(net)}
    x = functional.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], PATCH)
    grid = math.isqrt(weights["pos_embed"].shape[1] - 1)
    positions = weights["pos_embed"][:, 1:].transpose(1, 2).view(1, -1, grid, grid)
    x = x + functional.interpolate(positions, size=x.shape[-2:], mode="bicubic", align_corners=False)
    x = x.permute(0, 2, 3, 1)
    for number in range(TINY.depth):
        block = f"blocks.{number}."
        inner = layer_norm(x, weights, f"{block}norm1", -1)
        x = x + attention_of_block(inner, weights, f"{block}attn", windowed=number == 0)
        inner = layer_norm(x, weights, f"{block}norm2", -1)
        x = x + linear(functional.gelu(linear(inner, weights, f"{block}mlp.fc1")), weights, f"{block}mlp.fc2")
    return x.permute(0, 3, 1, 2)


def convolved(x, weights, name):
    """A convolution of 1 x 1 or 3 x 3 and, where it has one, its norm."""
    weight = weights[f"{name}.weight"]
    x = functional.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)
    return layer_norm(x, weights, f"{name}.norm", 1) if f"{name}.norm.weight" in weights else x


def enlarged(x, weights, name):
    return functional.conv_transpose2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)


def pyramid_of(x, weights):
    top = "backbone.simfp_"
    finest = functional.gelu(layer_norm(enlarged(x, weights, f"{top}2.0"), weights, f"{top}2.1", 1))
    rescaled = {
        ("2.4", "2.5"): enlarged(finest, weights, f"{top}2.3"),
        ("3.1", "3.2"): enlarged(x, weights, f"{top}3.0"),
        ("4.0", "4.1"): x,
        ("5.1", "5.2"): functional.max_pool2d(x, 2),
    }
    maps = [
        convolved(convolved(one, weights, top + first), weights, top + second)
        for (first, second), one in rescaled.items()
    ]
    return [*maps, maps[-1][..., ::2, ::2]]


def test_maps_are_detectron2s(weights, model):
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(6))
    expected = pyramid_of(encoded(images, weights), weights)
    with torch.no_grad():
        found = model.pyramid(model.encoder(images)[0])
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_proposals_logits_and_deltas_are_detectron2s(weights, model):
    maps = [torch.randn(2, CHANNELS, s, s + 1, generator=torch.Generator().manual_seed(s)) for s in (8, 4, 2)]
    with torch.no_grad():
        logits, deltas = model.rpn.head(maps)
    head = "proposal_generator.rpn_head."
    for number, x in enumerate(maps):
        for layer in ("conv0", "conv1"):
            x = convolved(x, weights, f"{head}conv.{layer}").relu()
        close(logits[number], convolved(x, weights, f"{head}objectness_logits"))
        close(deltas[number], convolved(x, weights, f"{head}anchor_deltas"))


def test_the_anchors_of_a_place_come_in_detectron2s_order(model):
    """Height / width 0.5, 1, 2."""
    maps = [torch.zeros(1, 1, 1, 1)] * 5
    (anchors,) = model.rpn.anchor_generator(ImageList(torch.zeros(1, 3, 8, 8), [(8, 8)]), maps)
    for side, cells in zip(model.rpn.anchor_generator.sides, anchors.split(3), strict=True):
        expected = [[side / ratio**0.5, side * ratio**0.5] for ratio in (0.5, 1, 2)]
        assert torch.allclose(cells[:, 2:] - cells[:, :2], torch.tensor(expected))


def test_scores_and_deltas_of_boxes_are_detectron2s(weights, model):
    pooled = torch.randn(5, CHANNELS, 7, 7, generator=torch.Generator().manual_seed(7))
    heads = model.roi_heads
    with torch.no_grad():
        scores, deltas = heads.box_predictor(heads.box_head(pooled))
    x = pooled
    for number in range(1, 5):
        x = convolved(x, weights, f"roi_heads.box_head.conv{number}").relu()
    x = linear(x.flatten(1), weights, "roi_heads.box_head.fc1").relu()
    expected = linear(x, weights, "roi_heads.box_predictor.cls_score")  # the background last
    close(scores[:, 1:], expected[:, :-1])
    close(scores[:, 0], expected[:, -1])
    close(deltas[:, 4:], linear(x, weights, "roi_heads.box_predictor.bbox_pred"))
    assert deltas[:, :4].eq(0).all()


def test_masks_of_boxes_are_detectron2s(weights, model):
    pooled = torch.randn(5, CHANNELS, 14, 14, generator=torch.Generator().manual_seed(8))
    heads = model.roi_heads
    with torch.no_grad():
        found = heads.mask_predictor(heads.mask_head(pooled))
    x = pooled
    for number in range(1, 5):
        x = convolved(x, weights, f"roi_heads.mask_head.mask_fcn{number}").relu()
    x = enlarged(x, weights, "roi_heads.mask_head.deconv").relu()
    close(found[:, 1:], convolved(x, weights, "roi_heads.mask_head.predictor"))
    assert found.shape == (5, 1 + CLASSES, 28, 28)


def test_buffers_of_older_files_are_left_out_and_reported(weights):
    older = weights | {
        "pixel_mean": torch.zeros(3, 1, 1),
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
    }
    report = load_vitdet(detector(), older)
    assert report.unused == ["pixel_mean", "proposal_generator.anchor_generator.cell_anchors.0"]


def changed(**more):
    return lambda weights: weights | {key.replace("__", "."): value for key, value in more.items()}


@pytest.mark.parametrize(
    ("change", "settings", "says"),
    [
        (lambda w: w, {"classes": 7}, "the file's detector has 3 classes, this one 7"),
        (lambda w: w, {"size": ViTSize(16, 32, 3, 2)}, "2 blocks"),
        (lambda w: w, {"image_size": (96, 96)}, r"wrong shape \(2\): .*blocks.1.attn.rel_pos_h is \[9, 16\], expected"),
        (lambda w: w, {"pretraining_size": 48}, r"wrong shape \(1\): .*pos_embed is \[1, 5, 32\], expected \[1, 10,"),
        (lambda w: w, {"global_blocks": ()}, r"wrong shape \(2\): .*blocks.1.attn.rel_pos_h"),
        (lambda w: w, {"size": ViTSize(14, 32, 2, 2), "image_size": (70, 70), "pretraining_size": 28}, "14 px"),
        (changed(optimizer__state=torch.zeros(1)), {}, r"unexpected \(1\): optimizer.state"),
        (lambda w: {k: v for k, v in w.items() if "fc1.bias" not in k}, {}, r"missing \(3\): .*box_head.fc1.bias"),
        (lambda w: {k: v for k, v in w.items() if "net." not in k}, {}, r"missing \(\d+\): backbone.net.pos_embed"),
        (
            lambda w: {k.replace("box_head.", "box_head.0.").replace("box_pr", "box_0.pr"): v for k, v in w.items()},
            {},
            r"missing \(.*unexpected \(.*not Cascade R-CNN",
        ),
    ],
)  # fmt: skip
def test_weights_of_another_model_are_refused_in_one_line_and_nothing_is_copied(weights, change, settings, says):
    made = detector(**settings)
    before = {key: value.clone() for key, value in made.state_dict().items()}
    with pytest.raises(UsageError, match=says) as refused:
        load_vitdet(made, change(weights))
    assert "\n" not in str(refused.value)
    assert same(made.state_dict(), before)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_of_the_model_zoo_is_read_as_it_is(weights, tmp_path, protocol):
    arrays = {key: value.numpy() for key, value in weights.items()}
    path = tmp_path / "model_final_000000.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}, protocol=protocol))
    assert same(read_weights(path), weights)


def test_names_of_numpy_before_2_are_read_too(tmp_path):
    content = pickle.dumps({"model": {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}}, protocol=2)
    assert b"numpy._core" in content
    (tmp_path / "old.pkl").write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    assert read_weights(tmp_path / "old.pkl")["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_torch_file_called_pkl_is_read_as_torchs(weights, tmp_path):
    torch.save({"model": weights, "iteration": 3}, tmp_path / "model_0000003.pkl")
    assert same(read_weights(tmp_path / "model_0000003.pkl"), weights)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_hidden_in_a_pickle_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "mark"
    for number, protocol in enumerate((0, 2, 4)):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(pickle.dumps({"model": {"a": np.zeros(3), "b": Hostile(mark)}}, protocol=protocol))
        with pytest.raises(UsageError, match=r"was refused: it names .*open, which arrays do not need") as refused:
            read_weights(path)
        assert "\n" not in str(refused.value)
    assert not mark.exists()


def test_pickles_of_other_things_are_refused_by_name(tmp_path):
    whole = pickle.dumps({"model": {"a": np.zeros(300)}})
    files = {
        "cut.pkl": (whole[: len(whole) // 2], "not a whole pickle of arrays"),
        "empty.pkl": (b"", "not a whole pickle of arrays"),
        "list.pkl": (pickle.dumps([1, 2]), "holds list"),
        "text.pkl": (pickle.dumps({"model": {"a": np.array(["x"])}}), "expected tensors by name"),
    }
    for name, (content, says) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=rf"{name}.*{says}"):
            read_weights(tmp_path / name)
