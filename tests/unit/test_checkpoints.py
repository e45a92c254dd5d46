"""Checkpoint files and folders: pieces from any ranks to any ranks, what is damaged, which stay; no ranks needed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from data_pipeline.errors import RunError
from mae_scale.checkpoints.shards import Piece, ShardReader, digest_of, share_of, write_shard
from mae_scale.checkpoints.store import (
    Damaged,
    Retention,
    beyond,
    folder_of,
    list_checkpoints,
    newest_whole,
    remove,
    set_aside,
    verify,
    write_manifest,
)


def state(sizes: list[int]) -> list[Piece]:
    return [Piece(f"weight/{number}", 0, torch.randn(size)) for number, size in enumerate(sizes)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 7), st.integers(1, 7))
def test_what_any_number_of_ranks_writes_any_other_number_reads(tmp_path_factory, sizes, writers, readers):
    folder, whole = tmp_path_factory.mktemp("shards"), state(sizes)
    for rank in range(writers):
        write_shard(folder / f"{rank}.safetensors", share_of(whole, rank, writers))
    with ShardReader(folder.iterdir()) as reader:
        for rank in range(readers):
            for mine in share_of(whole, rank, readers):
                read = Piece(mine.name, mine.start, torch.full_like(mine.data, torch.nan))
                reader.fill(read)
                assert torch.equal(read.data, mine.data)
        for piece in whole:
            if piece.data.numel():
                assert torch.equal(reader.whole(piece.name), piece.data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_a_shard_is_a_safetensors_file_whatever_the_dtypes(tmp_path, dtype):
    data = (torch.rand(13) * 5).to(dtype)
    written = write_shard(
        tmp_path / "a.safetensors", [Piece("odd", 0, torch.ones(3, dtype=torch.bool)), Piece("x", 7, data)]
    )
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x@7"], data)
    assert written == {
        "bytes": (tmp_path / "a.safetensors").stat().st_size,
        "sha256": digest_of(tmp_path / "a.safetensors"),
    }


def test_elements_that_no_file_has_are_an_error_that_names_them(tmp_path):
    write_shard(tmp_path / "a", [Piece("x", 0, torch.zeros(4)), Piece("x", 6, torch.zeros(4))])
    with ShardReader([tmp_path / "a"]) as reader:
        for start, n, missing in ((0, 10, "4 to 10"), (8, 4, "10 to 12"), (4, 1, "4 to 5")):
            with pytest.raises(RunError, match=f"elements {missing} of x"):
                reader.fill(Piece("x", start, torch.empty(n)))
        with pytest.raises(RunError, match="y is in none"):
            reader.whole("y")


def make(checkpoints: Path, step: int, *, epoch: float = 0.5, loss: float | None = None) -> Path:
    folder = folder_of(checkpoints, step)
    folder.mkdir(parents=True)
    files = {"rank_00000.safetensors": write_shard(folder / "rank_00000.safetensors", state([50]))}
    facts = {"step": step, "epoch": epoch, "loss": loss, "time": 0.0, "engine": "deepspeed ZeRO 2", "world_size": 1}
    write_manifest(folder, facts, files)
    return folder


def test_any_flipped_bit_of_any_file_is_found(tmp_path):
    folder = make(tmp_path, 1)
    assert verify(folder)["step"] == 1
    for name in ("rank_00000.safetensors", "manifest.json"):
        content = (folder / name).read_bytes()
        for position in range(0, len(content), 7):
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            if name == "manifest.json" and changed.split() == content.split():
                continue  # white space
            (folder / name).write_bytes(changed)
            with pytest.raises(Damaged, match=name.replace(".", r"\.")):
                verify(folder)
        (folder / name).write_bytes(content)
    assert verify(folder)["step"] == 1


def test_the_newest_whole_one_is_found_behind_damaged_ones(tmp_path, caplog):
    with pytest.raises(RunError, match="no whole checkpoint"):
        newest_whole(tmp_path)
    older, newer = make(tmp_path, 5), make(tmp_path, 10)
    os.truncate(newer / "rank_00000.safetensors", 100)
    assert newest_whole(tmp_path)[0] == older
    assert "step_00000005 is used, for what is newer is damaged (step_00000010: rank_00000" in caplog.text
    (older / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"step_00000005: manifest\.json is missing"):
        newest_whole(tmp_path)


def test_what_is_set_aside_is_no_checkpoint_and_never_overwritten(tmp_path):
    names = []
    for _ in range(2):
        names.append(set_aside(make(tmp_path, 5)).name)
    assert names == ["damaged_step_00000005", "damaged_step_00000005_2"]
    assert list_checkpoints(tmp_path) == []


def test_the_newest_every_nth_epoch_and_the_best_stay(tmp_path):
    for step in range(1, 13):
        make(tmp_path, step, epoch=step / 2, loss=abs(step - 5.1))
    os.truncate(folder_of(tmp_path, 3) / "manifest.json", 9)  # damaged: not pruned, not counted

    def gone(retention: Retention) -> list[int]:
        return [int(folder.name.removeprefix("step_")) for folder in beyond(tmp_path, retention)]

    assert gone(Retention(keep=2)) == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert gone(Retention(keep=1, every_epochs=2)) == [1, 2, 5, 6, 7, 9, 10, 11]
    assert gone(Retention(keep=1, every_epochs=3, best=True)) == [1, 2, 4, 7, 8, 9, 10, 11]
    remove(folder_of(tmp_path, 12))
    assert [step for step, _ in list_checkpoints(tmp_path)] == list(range(1, 12))


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


def test_the_manifest_is_json_that_others_read(tmp_path):
    manifest = json.loads((make(tmp_path, 7) / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["files"]["rank_00000.safetensors"].keys() == {"bytes", "sha256"}
