"""Pieces of a training state, from any number of ranks to any other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from data_pipeline.errors import RunError
from mae_scale.checkpoints.shards import Piece, ShardReader, digest_of, share_of, write_shard


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
