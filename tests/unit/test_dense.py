"""The encoder and the pyramid for dense tasks, beside transformers' VitDet and the plain encoder."""

import pytest
import torch
from torch.nn import functional
from transformers import VitDetConfig, VitDetModel

from data_pipeline.errors import UsageError
from mae_scale.models.dense import DenseEncoder, FeaturePyramid, evenly_placed, image_of, windows_of
from mae_scale.models.drop_path import draw_branch_scales
from mae_scale.models.vit import Encoder, ViTSize, patchify

SIZE = ViTSize(patch_size=4, width=32, depth=4, heads=2)
GLOBAL = (1, 3)


def encoder(image_size=(40, 24), window=3, **more) -> DenseEncoder:
    torch.manual_seed(0)
    return DenseEncoder(
        SIZE, image_size=image_size, pretraining_size=32, window=window, global_blocks=GLOBAL, **more
    ).eval()


def shaken(model):
    """The model with relative positions that are not zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:
                parameter.normal_(std=0.5)
    return model


def vitdet(ours: DenseEncoder, image_size: tuple[int, int], window: int) -> VitDetModel:
    """transformers' model with the weights of ours."""
    config = VitDetConfig(
        hidden_size=SIZE.width,
        num_hidden_layers=SIZE.depth,
        num_attention_heads=SIZE.heads,
        image_size=list(image_size),
        pretrain_image_size=32,
        patch_size=SIZE.patch_size,
        window_size=window,
        window_block_indices=[number for number in range(SIZE.depth) if number not in GLOBAL],
        use_relative_position_embeddings=True,
        layer_norm_eps=1e-6,
    )
    theirs, state = VitDetModel(config).eval(), {}
    for name, value in ours.state_dict().items():
        if name == "pos_embed":
            state["embeddings.position_embeddings"] = torch.cat([torch.zeros_like(value[:1]), value]).unsqueeze(0)
        elif name == "patch_embed.weight":
            convolution = value.reshape(-1, SIZE.patch_size, SIZE.patch_size, 3).permute(0, 3, 1, 2)
            state["embeddings.projection.weight"] = convolution
        elif name == "patch_embed.bias":
            state["embeddings.projection.bias"] = value
        else:
            state[name.replace("blocks.", "encoder.layer.").replace(".attn.", ".attention.")] = value
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("image_size", [(40, 24), (24, 36), (32, 32)])
@pytest.mark.parametrize("window", [3, 4, 14])
def test_maps_and_gradients_are_those_of_vitdet(image_size, window):
    ours = shaken(encoder(image_size, window))
    theirs = vitdet(ours, image_size, window)
    images = torch.randn(2, 3, *image_size)
    expected, (found,) = theirs(images).last_hidden_state, ours(images)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    weight = torch.randn_like(expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    peers = dict(theirs.named_parameters())
    for name, parameter in ours.blocks.named_parameters():
        gradient = peers[f"encoder.layer.{name}".replace(".attn.", ".attention.")].grad
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-5), name


def test_an_image_of_another_size_than_it_was_built_for_has_resampled_positions_as_vitdet():
    ours = shaken(encoder((40, 24)))
    images = torch.randn(1, 3, 48, 56)
    assert torch.allclose(ours(images)[0], vitdet(ours, (40, 24), 3)(images).last_hidden_state, rtol=0, atol=1e-5)


def test_the_first_forward_is_the_plain_encoders_where_every_block_sees_the_whole_image():
    """Of the same weights, without its cls token: a block's cls token would be attended to."""
    plain = Encoder(SIZE, image_size=32, final_norm=False).eval()
    dense = encoder((32, 32), window=8)
    state = plain.state_dict()
    missing, unexpected = dense.load_state_dict(state, strict=False)
    assert set(unexpected) == {"cls_token"}
    assert {name.rpartition(".")[2] for name in missing} == {"pos_embed", "rel_pos_h", "rel_pos_w"}
    images = torch.randn(2, 3, 32, 32)
    tokens = plain.patch_embed(patchify(images, 4)) + plain.pos_embed[1:]
    for block in plain.blocks:
        tokens = block(tokens)
    assert torch.allclose(dense(images)[0], tokens.transpose(1, 2).unflatten(2, (8, 8)), rtol=0, atol=1e-5)


def test_maps_after_several_blocks_and_dropped_branches_are_those_of_the_blocks_in_a_row():
    model = shaken(encoder(drop_path=0.5)).train()
    images = torch.randn(3, 3, 40, 24)
    scales = draw_branch_scales(model.drop_path_rates, seed=0, step=1, positions=torch.arange(3).numpy())
    x = (model.patch_embed(patchify(images, 4))).unflatten(1, (10, 6)) + model._positions(model.pos_embed, 10, 6)
    expected = []
    for number, block in enumerate(model.blocks):
        x = block(x, scales[:, number])
        expected.append(x.permute(0, 3, 1, 2))
    assert (scales == 0).any()
    found = model(images, scales, after=(0, 2, 3))
    for one, number in zip(found, (0, 2, 3), strict=True):
        assert torch.equal(one, expected[number])


@pytest.mark.parametrize(("height", "width", "side"), [(10, 6, 3), (7, 7, 14), (8, 4, 4), (1, 9, 2)])
def test_windows_are_put_back_where_they_were(height, width, side):
    x = torch.arange(2 * height * width * 5, dtype=torch.float).reshape(2, height, width, 5)
    assert torch.equal(image_of(windows_of(x, side), height, width), x)


def test_global_blocks_are_evenly_placed_as_published():
    assert [evenly_placed(depth) for depth in (12, 24, 32)] == [(2, 5, 8, 11), (5, 11, 17, 23), (7, 15, 23, 31)]
    with pytest.raises(UsageError, match="10 blocks cannot be cut into 4 equal parts"):
        evenly_placed(10)


def test_an_image_of_no_whole_patches_is_refused():
    with pytest.raises(UsageError, match="42 px is not a multiple of patch_size 4 px"):
        encoder()(torch.randn(1, 3, 42, 24))


def test_the_pyramid_has_maps_of_five_sizes_each_a_function_of_its_place():
    torch.manual_seed(0)
    pyramid = FeaturePyramid(32, channels=16)
    x = torch.randn(1, 32, 8, 12, requires_grad=True)
    maps = pyramid(x)
    assert [tuple(m.shape) for m in maps] == [
        (1, 16, 32, 48),
        (1, 16, 16, 24),
        (1, 16, 8, 12),
        (1, 16, 4, 6),
        (1, 16, 2, 3),
    ]
    assert torch.equal(maps[4], maps[3][:, :, ::2, ::2])
    for one in maps[:4]:  # normalised over the channels
        assert torch.allclose(one.mean(1), torch.zeros_like(one[:, 0]), atol=1e-5)
    one = functional.one_hot(torch.tensor(3 * 12 + 5), 96).reshape(1, 1, 8, 12).bool()
    changed = pyramid(torch.where(one, x + 1, x))
    far = [(m != c).any(1)[0] for m, c in zip(maps[:4], changed[:4], strict=True)]
    for moved, scale in zip(far, (4, 2, 1, 0.5), strict=True):
        rows, columns = moved.nonzero().unbind(1)
        for places, patch in ((rows, 3), (columns, 5)):
            assert places.min() >= patch * scale - 2
            assert places.max() <= (patch + 1) * scale + 1
