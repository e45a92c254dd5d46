"""The discrete VAE: its likelihood, divergence, noise, decoder and schedules beside independent ones."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Laplace, SigmoidTransform, TransformedDistribution, kl_divergence
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.normalisation import IMAGENET_MEAN, IMAGENET_STD
from mae_scale.config.load import load_recipe
from mae_scale.models.dvae import DiscreteVae, WordDecoder, divergence, log_likelihood, negative_elb, pictured
from mae_scale.models.tokeniser import TokeniserSize, from_normalised
from mae_scale.tasks.dvae.objective import Annealing, ReconstructThroughWords, gumbel_noise
from mae_scale.tasks.registry import task_of

SIZE = TokeniserSize(width=8, words=20, blocks_per_group=2)
CPU = torch.device("cpu")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DiscreteVae(SIZE)


def test_the_likelihood_is_that_of_the_sigmoid_of_a_laplace_variable():
    statistics, pixels = random(2, 6, 8, 8), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    location, scale = statistics[:, :3], statistics[:, 3:].exp()
    peer = TransformedDistribution(Laplace(location, scale), [SigmoidTransform()])
    assert torch.allclose(log_likelihood(statistics, pixels), peer.log_prob(0.1 + 0.8 * pixels), atol=1e-5)
    best = log_likelihood(statistics, pictured(statistics))
    inside = (location.sigmoid() > 0.1) & (location.sigmoid() < 0.9)
    moved = log_likelihood(statistics, pictured(statistics) + 1e-2)
    assert (best - moved)[inside].median() > 0


@pytest.mark.parametrize(("location", "log_scale"), [(0.0, 0.0), (1.5, -1.0), (-2.0, -2.0)])
def test_the_likelihood_integrates_to_one(location, log_scale):
    x = torch.sigmoid(torch.linspace(-30, 30, 600_001, dtype=torch.float64))
    statistics = torch.tensor([location] * 3 + [log_scale] * 3, dtype=torch.float64).view(1, 6, 1, 1)
    pixels = ((x - 0.1) / 0.8).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    density = log_likelihood(statistics, pixels).exp()[0, 0, 0]
    assert torch.trapezoid(density, x) == pytest.approx(1, abs=1e-4)


def test_the_divergence_is_that_of_torchs_distributions():
    logits = 3 * random(2, 20, 4, 4)
    peer = Categorical(logits=logits.permute(0, 2, 3, 1))
    uniform = Categorical(logits=torch.zeros(2, 4, 4, 20))
    assert torch.allclose(divergence(logits), kl_divergence(peer, uniform), atol=1e-5)
    assert torch.allclose(divergence(torch.ones(1, 20, 1, 1)), torch.zeros(1), atol=1e-6)
    assert divergence(100 * functional.one_hot(torch.tensor([3]), 20)[..., None, None].float()) == pytest.approx(
        math.log(20)
    )


def test_the_loss_is_the_published_sum_over_an_image_divided_by_its_values():
    statistics, logits = random(3, 6, 16, 16), random(3, 20, 2, 2)
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([0.0, 1.0, 6.6])
    found = negative_elb(statistics, logits, pixels, weights)
    for image in range(3):
        likelihood = log_likelihood(statistics, pixels)[image].sum()
        whole = -likelihood + weights[image] * divergence(logits)[image].sum()
        assert found[image].item() == pytest.approx(whole.item() / (3 * 16 * 16), rel=1e-5)


def test_noise_is_standard_gumbel_noise_of_each_images_own_seed():
    seeds = torch.tensor([5, 2**62 + 1, 7])
    noise = gumbel_noise(seeds, (200, 50, 20), CPU)
    assert noise.mean().item() == pytest.approx(0.5772157, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)
    for number, seed in enumerate(seeds):
        assert torch.equal(gumbel_noise(seed[None], (200, 50, 20), CPU)[0], noise[number])
    assert not torch.equal(noise[0], noise[1])
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = (logits[:, None] + gumbel_noise(torch.tensor([1]), (4, 200_000), CPU)[0]).argmax(dim=0)
    shares = torch.bincount(drawn) / len(drawn)
    assert torch.allclose(shares, logits.softmax(dim=0), atol=5e-3)


def test_relaxed_words_are_the_drawn_words_as_the_temperature_falls(model):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    noise = gumbel_noise(torch.tensor([1, 2]), (20, 4, 4), CPU)
    with torch.no_grad():
        logits = model.encoder(pixels)
        words = functional.one_hot((logits + noise).argmax(dim=1), 20).permute(0, 3, 1, 2).float()
        hard = model.decoder(words)
        distances = [(model(pixels, noise, torch.full((2,), t))[0] - hard).abs().max().item() for t in (1.0, 0.1, 1e-4)]
        best, found = model.most_probable(pixels)
        chosen = functional.one_hot(model.encoder.tokens(pixels).view(2, 4, 4), 20).permute(0, 3, 1, 2)
        assert torch.equal(best, model.decoder(chosen))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-5
    assert torch.equal(found, logits)


def test_the_decoder_is_the_published_one(model):
    """Written from its layers' names: group_N.block_K.{id_path, res_path.conv_1..4}, kernels 1, 3, 3, 3, upsampling."""
    state = dict(model.decoder.state_dict())

    def conv(name, x):
        weight = state[f"blocks.{name}.weight"]
        return functional.conv2d(x, weight, state[f"blocks.{name}.bias"], padding=weight.shape[-1] // 2)

    words = random(2, 20, 3, 3).softmax(dim=1)
    x = conv("input", words)
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            prefix, y = f"group_{group}.group.block_{block}", x
            for number in (1, 2, 3, 4):
                y = conv(f"{prefix}.res_path.path.conv_{number}", y.relu())
            own = f"blocks.{prefix}.id_path.weight" in state
            x = (conv(f"{prefix}.id_path", x) if own else x) + y / (4 * 2) ** 2
        if group < 4:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = conv("output.conv", x.relu())
    assert expected.shape == (2, 6, 24, 24)
    assert torch.allclose(model.decoder(words), expected, atol=1e-6)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in WordDecoder(TokeniserSize()).state_dict().items()}
    assert shapes["blocks.input.weight"] == (128, 8192, 1, 1)
    assert shapes["blocks.group_1.group.block_1.res_path.path.conv_1.weight"] == (512, 128, 1, 1)
    assert shapes["blocks.group_1.group.block_1.res_path.path.conv_4.weight"] == (2048, 512, 3, 3)
    assert shapes["blocks.output.conv.weight"] == (6, 256, 1, 1)


def test_weights_begin_as_published(model):
    weight = DiscreteVae(TokeniserSize(width=32, words=64)).encoder.state_dict()[
        "blocks.group_4.group.block_2.res_path.path.conv_2.weight"
    ]
    assert weight.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.05)
    assert all(not value.any() for name, value in model.state_dict().items() if name.endswith(".bias"))


def test_temperature_and_weight_follow_half_cosines_and_stay():
    recipe = load_recipe("pretrain/dvae_imagenet_256")
    annealing = Annealing.of(recipe.tokenisation, total_steps=3_000_000)
    assert annealing.at(0) == (1.0, 0.0)
    assert annealing.at(75_000)[0] == pytest.approx((1 + 1 / 16) / 2)
    assert annealing.at(2_500)[1] == pytest.approx(3.3, rel=1e-3)
    for step in (150_000, 3_000_000, 10**9):
        assert annealing.at(step) == (1 / 16, 6.6)
    temperatures, weights = zip(*map(annealing.at, range(0, 150_000, 500)), strict=True)
    assert list(temperatures) == sorted(temperatures, reverse=True)
    assert list(weights) == sorted(weights)


def test_draws_are_functions_of_seed_step_and_position(model):
    draw = ReconstructThroughWords(model, Annealing(0.1, 10, 5, 4), image_size=32, seed=1).draw
    seeds, temperature, weight = draw(3, np.arange(8))
    some, *_ = draw(3, np.array([6, 1]))
    assert some.tolist() == [seeds[6], seeds[1]]
    assert len(set(seeds.tolist()) | set(draw(4, np.arange(8))[0].tolist())) == 16
    assert temperature.dtype == weight.dtype == torch.float32
    assert (temperature[0].item(), weight[0].item()) == pytest.approx(Annealing(0.1, 10, 5, 4).at(3))


def test_normalised_images_become_pixels_again():
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.allclose(from_normalised((pixels - mean) / std), pixels, atol=1e-6)


TINY = ["model.image_size=32", "tokeniser.width=8", "tokeniser.words=20"]


def test_flops_are_those_that_torch_counts(tmp_path):
    task = task_of(load_recipe("pretrain/dvae_demo", TINY), tmp_path)
    objective = task._objective(10)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        objective(random(1, 3, 32, 32), torch.zeros(1, 20, 4, 4), torch.ones(1), torch.ones(1))
    assert task.training_flops() == 3 * counter.get_total_flops()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.image_size=30", "model.image_size=30: a word stands for 8 x 8 pixels"),
        ("tokeniser.weights=x", "tokeniser.weights: task dvae trains a tokeniser"),
        ("tokeniser.tokens=x", "tokeniser.tokens: task dvae trains a tokeniser"),
        ("model.drop_path=0.1", "task dvae does not drop paths"),
        ("tokeniser.width=10", "tokeniser.width=10"),
        ("tracking.knn_images=100", "task dvae has no features to compare"),
        ("tokeniser=null", "task: dvae trains a tokeniser, and there is no section tokeniser"),
    ],
)
def test_what_a_recipe_says_in_vain_or_wrongly_is_refused(override, message, call, tmp_path):
    where = ["--out", tmp_path / "run", f"data.root={tmp_path}", f"data.val_root={tmp_path}", "tracking.uri=off"]
    code, _, error = call("pretrain", "pretrain/dvae_demo", *where, override)
    assert (code, error.count("\n")) == (2, 1), error
    assert message in error
    assert list(tmp_path.iterdir()) == []
