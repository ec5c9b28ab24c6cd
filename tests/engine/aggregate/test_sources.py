"""Tiles cover every chosen number once; clients that do not fit are named."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.aggregate import sources
from anabranch.aggregate.sources import NamedTensors, pieces, tile_columns


@given(st.integers(1, 40), st.integers(1, 4), st.randoms(use_true_random=False))
def test_tiles_cover_what_is_chosen_once(kib, N, random):
    clients = [{"a": torch.randn(50, 130), "b": torch.randn(()), "c": torch.randn(0)} for _ in range(N)]
    base = {name: x + 1 for name, x in clients[0].items()}
    chosen = [random.sample(range(N), random.randint(0, N)), None, list(range(N))]
    seen = {}
    with patch.object(sources, "TILE_BYTES", kib << 10):
        for tile in NamedTensors(clients, base).tiles(chosen, base=True):
            assert tile.begin % 1024 == 0
            seen.setdefault(tile.entry, []).append(torch.cat([tile.rows, tile.base[None]]))
    assert seen.keys() == {0}
    wanted = torch.stack([*(clients[i]["a"].flatten() for i in chosen[0]), base["a"].flatten()])
    assert torch.equal(torch.cat(seen[0], 1), wanted)


def test_a_tile_is_as_large_as_it_may_be_and_does_not_depend_on_who_is_chosen():
    for N, dtype in ((1, torch.float64), (32, torch.bfloat16), (1000, torch.float32)):
        size = (N + 1) * dtype.itemsize
        assert sources.TILE_BYTES - 1024 * size < tile_columns(N, dtype) * size <= sources.TILE_BYTES
    assert tile_columns(10**6, torch.float32) == 1024
    entries = [sources.Entry("a", torch.float32, (10_000_000,))]
    assert list(pieces(entries, 8, [[0]])) == list(pieces(entries, 8, [range(8)]))


def test_what_differs_is_named():
    fits = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    with pytest.raises(ValueError, match="no clients"):
        NamedTensors([])
    other = {"a": torch.zeros(3, 2), "c": torch.zeros(1)}
    words = (
        r"client 1 does not hold the tensors of client 0: 1 tensors missing: b; 1 tensors unexpected: c; "
        r"1 tensors that differ: a is \[3, 2\] torch.float32 instead of \[2, 3\] torch.float32"
    )
    with pytest.raises(ValueError, match=words):
        NamedTensors([fits, other])
    with pytest.raises(ValueError, match=r"the base does not hold.*b is \[4\] torch.float16"):
        NamedTensors([fits], {**fits, "b": torch.zeros(4).half()})
    with pytest.raises(ValueError, match="9 tensors missing: 0, 1, 2, 3, 4, 5, …"):
        NamedTensors([{str(i): torch.zeros(1) for i in range(9)}, {}])
