"""`mae-scale checkpoints`: list, verify, prune."""

import os
import shutil

import pytest

from mae_scale.checkpoints.store import (
    folder_of,
    list_checkpoints,
)
from tests.unit.test_store import make


def test_list_verify_and_prune_say_what_there_is_and_what_is_whole(call, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (1000, 2000, 3000):
        make(checkpoints, step, epoch=step / 100, loss=0.25)
    shutil.copytree(checkpoints / "step_00001000", checkpoints / ".step_00004000.partial")
    code, out, _ = call("checkpoints", "list", tmp_path / "run")
    assert code == 0
    assert out.splitlines()[0].split() == ["step", "epoch", "age", "size", "loss", "ranks", "written", "by", "whole"]
    assert "2,000  20.00" in out
    assert out.count("yes (sizes)") == 3
    assert ".step_00004000.partial: being written now, or left" in out
    assert call("checkpoints", "verify", checkpoints)[0] == 0

    shard = checkpoints / "step_00002000" / "rank_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, out, _ = call("checkpoints", "verify", tmp_path / "run")
    assert code == 1
    assert "step_00002000: rank_00000.safetensors is not what was written" in out
    assert call("checkpoints", "list", tmp_path / "run")[0] == 0

    code, out, _ = call("checkpoints", "prune", tmp_path / "run", "--keep", 1)
    assert code == 0
    assert out.splitlines()[-1] == "3 removed"
    assert [step for step, _ in list_checkpoints(checkpoints)] == [3000]


def test_prune_keeps_the_newest_whole_one_though_newer_ones_are_damaged(call, tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    os.truncate(folder_of(tmp_path, 3) / "rank_00000.safetensors", 100)
    assert call("checkpoints", "prune", tmp_path, "--keep", 1)[:2] == (0, "removed step_00000001\n1 removed\n")
    os.truncate(folder_of(tmp_path, 2) / "rank_00000.safetensors", 100)
    code, _, error = call("checkpoints", "prune", tmp_path, "--keep", 1)
    assert (code, len(list_checkpoints(tmp_path))) == (1, 2)
    assert "holds no whole checkpoint" in error


@pytest.mark.parametrize("command", ["list", "verify", "prune"])
def test_a_folder_without_checkpoints_is_one_clear_line(call, tmp_path, command):
    for path, said in ((tmp_path, "has no checkpoints yet"), (tmp_path / "x", "is not a folder")):
        code, _, error = call("checkpoints", command, path)
        assert code == 2
        assert error.count("\n") == 1
        assert f"{path} {said}" in error
