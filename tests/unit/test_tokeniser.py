"""The tokeniser beside transformers' FlavaImageCodebook, and its files, also whole modules of another program."""

import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

from data_pipeline.errors import UsageError
from mae_scale import load_tokeniser
from mae_scale.models.tokeniser import Tokeniser, TokeniserSize

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # torch, of classes made here

SIZE = TokeniserSize(width=16, words=50, blocks_per_group=2)


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    config = FlavaImageCodebookConfig(hidden_size=SIZE.width, vocab_size=SIZE.words, num_blocks_per_group=2)
    model = FlavaImageCodebook(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def as_published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of DALL-E's encoder."""
    rename = lambda key: key.replace(".group.", ".").replace("path.path.", "path.")  # noqa: E731
    return {rename(key).replace(".weight", ".w").replace(".bias", ".b"): value for key, value in state.items()}


def test_the_default_size_is_the_published_one():
    with torch.device("meta"):
        ours, theirs = Tokeniser(), FlavaImageCodebook(FlavaImageCodebookConfig())
    shapes = lambda model: {name: value.shape for name, value in model.state_dict().items()}  # noqa: E731
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("layout", ["safetensors", "torch", "published names", "inside FLAVA"])
def test_a_file_of_any_layout_gives_the_peers_logits_and_words(layout, peer, images, tmp_path):
    state = {key: value.clone() for key, value in peer.state_dict().items()}
    path = tmp_path / ("weights.safetensors" if layout in ("safetensors", "inside FLAVA") else "weights.pt")
    if layout == "published names":
        state = as_published(state)
        assert "blocks.group_1.block_1.res_path.conv_1.w" in state
    if layout == "inside FLAVA":
        state = {f"image_codebook.{key}": value for key, value in state.items()} | {"text.weight": torch.ones(2)}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    ours = load_tokeniser(path)
    assert (ours.size, ours.training) == (SIZE, False)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    with torch.no_grad():
        expected = peer(0.8 * images + 0.1)
    torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.tokens(images), peer.get_codebook_indices(0.8 * images + 0.1).flatten(1))
    assert ours.tokens(images).shape == (3, 16)


@pytest.fixture
def foreign(monkeypatch):
    """A package with classes like those of DALL-E's encoder."""
    package = ModuleType("dall_e_like")
    source = """
class Conv2d(nn.Module):
    def __init__(self, n_in, n_out, kernel):
        super().__init__()
        self.kernel, self.device = kernel, torch.device("cpu")
        self.w, self.b = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel)), nn.Parameter(torch.randn(n_out))

class Block(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        n = n_out // 4
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        convs = [Conv2d(n_in, n, 3), Conv2d(n, n, 3), Conv2d(n, n, 3), Conv2d(n, n_out, 1)]
        parts = [(f"{k}_{i}", m) for i, c in enumerate(convs, 1) for k, m in (("relu", nn.ReLU()), ("conv", c))]
        self.res_path = nn.Sequential(OrderedDict(parts))

class Encoder(nn.Module):
    def __init__(self, width, words):
        super().__init__()
        parts, widths = [("input", Conv2d(3, width, 7))], [width, width, 2 * width, 4 * width, 8 * width]
        for g in range(4):
            blocks = [("block_1", Block(widths[g], widths[g + 1])), ("block_2", Block(widths[g + 1], widths[g + 1]))]
            pool = [("pool", nn.MaxPool2d(kernel_size=2))] if g < 3 else []
            parts.append((f"group_{g + 1}", nn.Sequential(OrderedDict(blocks + pool))))
        output = [("relu", nn.ReLU()), ("conv", Conv2d(8 * width, words, 1))]
        self.blocks = nn.Sequential(OrderedDict([*parts, ("output", nn.Sequential(OrderedDict(output)))]))
"""
    exec(source, vars(package) | {"nn": nn, "torch": torch, "OrderedDict": OrderedDict}, made := {})
    for name, kind in made.items():
        kind.__module__, kind.__qualname__ = package.__name__, name
        setattr(package, name, kind)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    for kind in made.values():  # their methods look names up here
        for method in vars(kind).values():
            if callable(method):
                method.__globals__.update(nn=nn, torch=torch, OrderedDict=OrderedDict, **made)
    return package


@pytest.mark.parametrize("zipped", [True, False])
def test_a_module_that_was_pickled_whole_is_read_without_its_package(zipped, foreign, images, tmp_path, monkeypatch):
    torch.manual_seed(2)
    theirs, path = foreign.Encoder(SIZE.width, SIZE.words), tmp_path / "encoder.pkl"
    torch.save(theirs, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, foreign.__name__)
    ours = load_tokeniser(path)
    given = theirs.state_dict()
    assert torch.equal(
        ours.state_dict()["blocks.group_2.group.block_1.id_path.weight"], given["blocks.group_2.block_1.id_path.w"]
    )
    assert len(given) == len(ours.state_dict())
    assert {tuple(value.shape) for value in given.values()} == {tuple(v.shape) for v in ours.state_dict().values()}
    assert as_published(dict(ours.state_dict())).keys() == given.keys()
    assert all(torch.equal(value, given[key]) for key, value in as_published(dict(ours.state_dict())).items())


class Hostile:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["open", "eval", "exec", "os.system", "subprocess.call", "torch.load", "getattr"])
def test_a_hostile_module_is_refused_and_leaves_nothing_behind(name, zipped, foreign, tmp_path):
    import os
    import subprocess

    mark, path = tmp_path / "mark", tmp_path / "encoder.pkl"
    code = f"open({str(mark)!r}, 'w')"
    call = {
        "open": Hostile(open, str(mark), "w"),
        "eval": Hostile(eval, code),
        "exec": Hostile(exec, code),
        "os.system": Hostile(os.system, f"touch {mark}"),
        "subprocess.call": Hostile(subprocess.call, ["touch", str(mark)]),
        "torch.load": Hostile(torch.load, str(mark)),
        "getattr": Hostile(getattr, "", "join"),
    }[name]
    theirs = foreign.Encoder(SIZE.width, SIZE.words)
    theirs.extra = call
    torch.save(theirs, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match="was refused: it names"):
        load_tokeniser(path)
    assert not mark.exists()


def test_what_is_no_tokeniser_is_refused(peer, tmp_path):
    state = dict(peer.state_dict())
    save_file({"head.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    save_file({k: v.clone() for k, v in state.items() if "group_3" not in k}, tmp_path / "part.safetensors")
    (tmp_path / "damaged.pkl").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "cut.pkl").write_bytes(b"\x80\x02garbage")
    with open(tmp_path / "numbers.pkl", "wb") as file:
        pickle.dump([1, 2], file)
    torch.save(nn.ReLU(), tmp_path / "empty.pkl")
    for name, message in {
        "other.safetensors": "has no tokeniser",
        "part.safetensors": r"missing \(18\): blocks.group_3",
        "damaged.pkl": "is not a whole torch file",
        "cut.pkl": "is not a whole torch file",
        "numbers.pkl": "is not a whole torch file",
        "empty.pkl": "holds no torch module with weights",
        "none.pkl": "no (file|tokeniser) at",
        "none.pt": "no weights file at",
    }.items():
        with pytest.raises(UsageError, match=message):
            load_tokeniser(Path(tmp_path / name))


def test_images_of_a_side_that_is_no_multiple_of_eight_are_refused():
    with pytest.raises(UsageError, match=r"S a multiple of 8"):
        Tokeniser(SIZE)(torch.zeros(1, 3, 30, 32))
