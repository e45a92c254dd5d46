"""Small data folders: images of three classes, and three shards."""

from pathlib import Path

import pytest

from tests.pictures import put, small, write_shard


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "data"
    for number in range(12):
        put(root, f"{'cab'[number % 3]}/{number:02d}.jpg", small(30 + number, 50))
    return root


@pytest.fixture
def shards(tmp_path) -> Path:
    root = tmp_path / "shards"
    for shard in range(3):
        members = {}
        for number in range(4):
            key = f"part/{'long' * 40 if number == 3 else ''}{shard}{number}"
            members[f"{key}.jpg"] = small(20 + shard, 30 + number)
            if number != 2:
                members[f"{key}.cls"] = b"%d\n" % number
        write_shard(root / f"{shard:04d}.tar", members)
    return root
