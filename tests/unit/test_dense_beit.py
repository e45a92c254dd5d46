"""BEiT's encoder for detection and segmentation, beside timm's and transformers' BEiT."""

import pytest
import torch
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models.beit import Beit as TimmBeit
from transformers import BeitConfig
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

from data_pipeline.errors import UsageError
from mae_scale.config.load import load_recipe
from mae_scale.launch.transfer_check import refuse_other_model
from mae_scale.models.beit import Beit
from mae_scale.models.dense import BiasedAttention, DenseEncoder
from mae_scale.models.detector import MaskRcnn
from mae_scale.models.segmenter import Segmenter
from mae_scale.models.vit import ViTSize
from mae_scale.models.weights.beit import beit_to_hf, beit_to_official, beit_to_timm
from mae_scale.models.weights.dense import load_dense
from mae_scale.models.weights.vitdet import detector_to_vitdet

SIZE = ViTSize(patch_size=4, width=32, depth=4, heads=2)
TABLE = "attn.relative_position_bias_table"
NOT_SEEN = -1e9
"""A bias with which no patch attends to the cls token, as if it were not there."""


def encoder(image_size=(32, 32), window=None, **more) -> DenseEncoder:
    torch.manual_seed(0)
    places = range(SIZE.depth) if window is None else (1, 3)
    return DenseEncoder(
        SIZE,
        image_size=image_size,
        pretraining_size=32,
        window=window or 1,
        global_blocks=places,
        layer_scale=0.1,
        **more,
    ).eval()


def shaken(model):
    """The model with biases, and scales of branches, that are not what they begin as."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("table", "_bias", "gamma_1", "gamma_2")):
                parameter.normal_(std=0.5)
    return model


def peer(image_size=(32, 32)) -> TimmBeit:
    """timm's BEiT whose patches do not see its cls token."""
    model = TimmBeit(
        img_size=image_size,
        patch_size=SIZE.patch_size,
        embed_dim=SIZE.width,
        depth=SIZE.depth,
        num_heads=SIZE.heads,
        num_classes=0,
        init_values=0.1,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
    ).eval()
    with torch.no_grad():
        for block in shaken(model).blocks:
            block.attn.relative_position_bias_table[-2] = NOT_SEEN  # of a patch to it
    return model


def segmenter(**more) -> Segmenter:
    return Segmenter(encoder(**more), classes=3, after=(0, 1, 2, 3), channels=8, auxiliary_channels=8)


def file_of(model: TimmBeit) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.endswith("index")}


@pytest.mark.parametrize("image_size", [(32, 32), (40, 24)])
def test_maps_and_gradients_are_those_of_timms_beit_without_its_cls_token(image_size):
    theirs, model = peer(image_size), segmenter(image_size=image_size)
    grid = (image_size[0] // 4, image_size[1] // 4)
    report = load_dense(model, file_of(theirs), grid)
    assert set(report.unused) >= {"cls_token"}
    images = torch.randn(2, 3, *image_size)
    expected = theirs.forward_intermediates(images, norm=False, intermediates_only=True)
    maps = model.encoder(images, after=range(SIZE.depth))
    for found, one in zip(maps, expected, strict=True):
        assert torch.allclose(found, one, rtol=0, atol=1e-5)
    weight = torch.randn_like(expected[-1])
    (maps[-1] * weight).sum().backward()
    (expected[-1] * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.blocks.named_parameters()}
    for name, parameter in model.encoder.blocks.named_parameters():
        gradient = gradients[name][:-3] if name.endswith(TABLE) else gradients[name]
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-5), name


def test_a_window_is_an_image_of_its_own():
    """In a block with windows of 4 x 4 patches each quarter has the features of an image of that size."""
    theirs, model = peer((16, 16)), segmenter(window=4)
    load_dense(model, file_of(theirs))
    x = torch.randn(1, 8, 8, SIZE.width)
    found = model.encoder.blocks[0](x)
    block = theirs.blocks[0]
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 4), slice(4, 8)):
            tokens = torch.cat([torch.zeros(1, 1, SIZE.width), x[:, rows, columns].flatten(1, 2)], dim=1)
            expected = block(tokens)[:, 1:].unflatten(1, (4, 4))
            assert torch.allclose(found[:, rows, columns], expected, rtol=0, atol=1e-5)


def test_biases_of_an_image_of_another_size_are_transformers():
    config = BeitConfig(num_attention_heads=2, hidden_size=32, patch_size=4, image_size=32)
    theirs, attention = BeitRelativePositionBias(config), BiasedAttention(32, 2, 8, 8)
    with torch.no_grad():
        table = theirs.relative_position_bias_table.normal_()
        attention.relative_position_bias_table.copy_(table[:-3])
    for height, width in ((8, 8), (12, 5), (3, 16)):
        expected = theirs((height, width))[..., 1:, 1:].reshape(1, 2, height * width, height * width)
        assert torch.allclose(attention._bias(height, width), expected, rtol=0, atol=1e-6)


def test_a_pretraining_gives_each_block_the_shared_table_resampled_to_its_window_or_image():
    pretrained = shaken(Beit(SIZE, image_size=32, layer_scale=0.1, target="normalised_pixels"))
    table = pretrained.encoder.rel_pos_bias.relative_position_bias_table.detach()
    for state in (beit_to_official(pretrained), beit_to_timm(pretrained), beit_to_hf(pretrained)):
        model = segmenter(image_size=(64, 64), window=4)
        report = load_dense(model, state)
        assert not [name for name in report.not_set if name.startswith("encoder.")]
        for number, block in enumerate(model.encoder.blocks):
            grid = (16, 16) if number in (1, 3) else (4, 4)
            rows = (2 * grid[0] - 1) ** 2
            expected = resize_rel_pos_bias_table(table, grid, (rows + 3, 2))[:-3]
            assert torch.allclose(block.attn.relative_position_bias_table, expected, rtol=0, atol=1e-6)
            assert torch.equal(block.gamma_2, pretrained.encoder.blocks[number].gamma_2)


def test_what_is_fresh_begins_as_in_pretraining():
    """Tables at zero, scales at layer_scale, no absolute positions; block n's last layers divided by sqrt(2 n)."""
    model = encoder()
    assert model.pos_embed is None
    for number, block in enumerate(model.blocks, start=1):
        assert not block.attn.relative_position_bias_table.any()
        assert torch.equal(block.gamma_1, torch.full((32,), 0.1))
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02 * 0.54, rel=0.05)  # a normal cut at 1 std
        assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02 * 0.54 / (2 * number) ** 0.5, rel=0.05)


def test_the_other_kind_of_encoder_is_refused():
    """Each line says what to set; nothing is copied."""
    vit = DenseEncoder(SIZE, image_size=(32, 32), pretraining_size=32, window=1, global_blocks=range(4))
    plain, beit = Segmenter(vit, classes=3, after=(0, 1, 2, 3), channels=8, auxiliary_channels=8), segmenter()
    with pytest.raises(UsageError, match=r"weights of a BEiT, and the recipe has model.encoder=vit: set model.encoder"):
        load_dense(plain, file_of(peer()))
    state = {name: value.clone() for name, value in beit.state_dict().items()}
    file = {name.removeprefix("encoder."): value for name, value in plain.state_dict().items() if "encoder" in name}
    with pytest.raises(UsageError, match=r"no weights of a BEiT .*model.encoder=beit: give those of a BEiT"):
        load_dense(beit, file)
    assert all(torch.equal(state[name], value) for name, value in beit.state_dict().items())


def test_vitdets_layout_has_no_names_for_it():
    with pytest.raises(UsageError, match="ViTDet's layout has no names for BEiT's encoder"):
        detector_to_vitdet(MaskRcnn(encoder(), classes=3, channels=8))


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_chain_of_jobs_may_begin_with_it(task):
    pretraining, own = load_recipe("pretrain/beit_vit_base_800ep"), ["model.encoder=beit", "model.layer_scale=0.1"]
    refuse_other_model("the first", pretraining, load_recipe(f"{task}/vit_base", own))
    with pytest.raises(UsageError, match="it starts from the first, and these are weights of a BEiT"):
        refuse_other_model("the first", pretraining, load_recipe(f"{task}/vit_base"))
