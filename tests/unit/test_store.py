"""The folder of checkpoints: which are whole, which stay."""

import json
import os
from pathlib import Path

import pytest

from data_pipeline.errors import RunError
from mae_scale.checkpoints.shards import write_shard
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
from tests.unit.test_shards import state


def make(checkpoints: Path, step: int, *, epoch: float = 0.5, loss: float | None = None, **more: object) -> Path:
    folder = folder_of(checkpoints, step)
    folder.mkdir(parents=True)
    files = {"rank_00000.safetensors": write_shard(folder / "rank_00000.safetensors", state([50]))}
    facts = {"step": step, "epoch": epoch, "loss": loss, "time": 0.0, "engine": "deepspeed ZeRO 2", "world_size": 1}
    write_manifest(folder, facts | more, files)
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
    assert "step_00000005 is used, because newer checkpoints are damaged (step_00000010: rank_00000" in caplog.text
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
        measured = {} if step % 4 else {"val/loss": abs(step - 8.1), "val/top1": 10 - step}
        make(tmp_path, step, epoch=step / 2, loss=abs(step - 5.1), measured=measured)
    os.truncate(folder_of(tmp_path, 3) / "manifest.json", 9)  # damaged: not pruned, not counted

    def gone(retention: Retention) -> list[int]:
        return [int(folder.name.removeprefix("step_")) for folder in beyond(tmp_path, retention)]

    assert gone(Retention(keep=2)) == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert gone(Retention(keep=1, every_epochs=2)) == [1, 2, 5, 6, 7, 9, 10, 11]
    assert gone(Retention(keep=1, every_epochs=3, best="train/loss")) == [1, 2, 4, 7, 8, 9, 10, 11]
    assert gone(Retention(keep=1, best="val/loss")) == [1, 2, 4, 5, 6, 7, 9, 10, 11]
    assert gone(Retention(keep=1, best="val/top1")) == [1, 2, 5, 6, 7, 8, 9, 10, 11]
    assert gone(Retention(keep=1, best="val/knn_top1")) == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]  # never measured
    remove(folder_of(tmp_path, 12))
    assert [step for step, _ in list_checkpoints(tmp_path)] == list(range(1, 12))


def test_the_manifest_is_json_that_others_read(tmp_path):
    manifest = json.loads((make(tmp_path, 7) / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["files"]["rank_00000.safetensors"].keys() == {"bytes", "sha256"}
