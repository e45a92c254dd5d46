"""Files of weights are read without running what they hide."""

import argparse
import pickle

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.errors import UsageError
from mae_scale.models.weights.autoencoder import to_official
from mae_scale.models.weights.files import read_weights
from tests.unit.test_autoencoder_weights import same, tiny


def test_release_and_safetensors_files_are_read(tmp_path):
    state = to_official(tiny())
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, tmp_path / "release.pth")
    torch.save(state, tmp_path / "bare.pth")
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("release.pth", "bare.pth", "weights.safetensors"):
        assert same(read_weights(tmp_path / name), state)


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "mark"
    writers = ((torch.save, "zip.pth", {}), (pickle.dump, "plain.pth", {"protocol": 2}))
    for writer, name, protocol in writers:
        with open(tmp_path / name, "wb") as file:
            writer({"model": {"cls_token": _Hostile(str(mark))}}, file, **protocol)
        with pytest.raises(UsageError, match="refused"):
            read_weights(tmp_path / name)
    assert not mark.exists()


def test_damaged_and_foreign_files_are_refused(tmp_path):
    torch.save(to_official(tiny()), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(content[:100])
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "picture.pth").write_bytes(b"GIF89a")  # to torch the start of a pickled number
    for name in ("cut.pth", "empty.pth", "cut.safetensors", "list.pth", "picture.pth", "none.pth"):
        with pytest.raises(UsageError, match=name):
            read_weights(tmp_path / name)
