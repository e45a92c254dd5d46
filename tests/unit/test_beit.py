"""BEiT beside transformers' BeitForMaskedImageModeling: logits, loss and gradients."""

import pytest
import torch
from torch import nn
from transformers import BeitConfig, BeitForMaskedImageModeling

from data_pipeline.errors import UsageError
from mae_scale.models.beit import Beit, relative_positions
from mae_scale.models.vit import ViTSize, patchify
from mae_scale.models.weights.beit import PRETRAINING, beit_release_names, load_beit
from mae_scale.models.weights.layouts import from_release

SIZE, IMAGE, WORDS = ViTSize(patch_size=8, width=32, depth=3, heads=4), 32, 50


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    config = BeitConfig(
        vocab_size=WORDS,
        hidden_size=SIZE.width,
        num_hidden_layers=SIZE.depth,
        num_attention_heads=SIZE.heads,
        intermediate_size=4 * SIZE.width,
        layer_norm_eps=1e-6,
        image_size=IMAGE,
        patch_size=SIZE.patch_size,
        use_mask_token=True,
        use_absolute_position_embeddings=False,
        use_relative_position_bias=False,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
        use_mean_pooling=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BeitForMaskedImageModeling(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def ours(peer) -> Beit:
    model = Beit(SIZE, image_size=IMAGE, words=WORDS, layer_scale=0.1, mask_ratio=0.7)
    assert not load_beit(model, peer.state_dict()).not_set
    return model.train()


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, IMAGE, IMAGE, generator=generator)
    mask = torch.rand(3, 16, generator=generator) < 0.4
    return images, mask, torch.randint(WORDS, (3, 16), generator=generator)


def test_logits_loss_and_gradients_are_the_peers(peer, ours, batch):
    images, mask, tokens = batch
    peer.zero_grad()
    found = peer(images, bool_masked_pos=mask, labels=tokens[mask])
    found.loss.backward()
    losses, logits = ours(images, mask, tokens)
    loss = losses.sum() / mask.sum()
    loss.backward()
    there = torch.arange(ours.removed) < mask.sum(dim=1, keepdim=True)  # [B, R]
    torch.testing.assert_close(logits[there], found.logits[mask], atol=1e-5, rtol=1e-5)
    assert not losses[~there].any()
    assert abs(float((loss - found.loss).detach())) < 1e-5
    gradients = from_release(
        beit_release_names({name: parameter.grad for name, parameter in peer.named_parameters()}), PRETRAINING
    )
    for name, parameter in ours.named_parameters():
        expected = gradients[name]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5 * float(expected.abs().max()) + 1e-7, rtol=1e-4)


def test_features_without_a_mask_are_the_peers(peer, ours, batch):
    with torch.no_grad():
        expected = peer.layernorm(peer.beit(batch[0]).last_hidden_state)
        torch.testing.assert_close(ours.features(batch[0]), expected, atol=1e-5, rtol=1e-5)


def test_a_branch_that_is_dropped_is_not_there(ours, batch):
    nothing = torch.zeros(3, SIZE.depth, 2)
    with torch.no_grad():
        x = ours.encoder.patch_embed(patchify(batch[0], SIZE.patch_size))
        x = torch.cat([ours.encoder.cls_token.expand(3, -1, -1), x], dim=1)
        torch.testing.assert_close(ours.features(batch[0], None, nothing), ours.encoder.norm(x))
        kept = ours.features(batch[0], None, torch.ones(3, SIZE.depth, 2))
        torch.testing.assert_close(kept, ours.features(batch[0]))


def test_pairs_that_lie_apart_alike_share_a_bias():
    rows = relative_positions(3)
    assert rows.shape == (10, 10)
    assert rows.max() == 27
    assert (rows[0, 0], rows[0, 5], rows[5, 0]) == (27, 25, 26)
    assert rows[1, 2] == rows[4, 5] == rows[8, 9]  # one column to the right
    assert rows[1, 4] == rows[6, 9] != rows[4, 1]  # one row down, and up
    assert len(rows[1:, 1:].unique()) == 25


def test_a_fresh_model_is_initialised_as_the_authors():
    torch.manual_seed(0)
    model = Beit(ViTSize(8, 64, 4, 4), image_size=32, words=1000, layer_scale=0.1)
    assert float(model.head.weight.std()) == pytest.approx(0.0108, rel=0.05)  # of a normal of 0.02 cut at one deviation
    first, last = model.encoder.blocks[0].mlp.fc2.weight.std(), model.encoder.blocks[3].mlp.fc2.weight.std()
    assert float(first / last) == pytest.approx(2, rel=0.1)
    assert float(model.encoder.blocks[0].gamma_1[0]) == pytest.approx(0.1)
    assert not model.encoder.rel_pos_bias.relative_position_bias_table.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Beit(ViTSize(8, 30, 1, 4), image_size=32, words=5, layer_scale=0.1), "width 30 is not a multiple of"),
        (lambda: Beit(SIZE, image_size=30, words=5, layer_scale=0.1), "image_size 30 px is not a multiple of"),
        (lambda: Beit(SIZE, image_size=32, words=5, layer_scale=0.1).features(torch.zeros(1, 3, 16, 16)), "takes"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()
