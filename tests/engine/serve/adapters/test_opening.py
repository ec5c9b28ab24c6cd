"""How much room adapters get, and what cannot be."""

import pytest

from anabranch import LLM
from anabranch.adapters.attach import linear_layers
from anabranch.models.weights import load_model, save_model
from anabranch.serve.adapters import opening
from anabranch.serve.adapters.arena import bytes_per_rank


@pytest.fixture(scope="module")
def folder(build, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(build(), path)
    return path


@pytest.fixture(scope="module")
def rank_bytes(folder):
    return bytes_per_rank(linear_layers(load_model(folder)))


@pytest.fixture(scope="module")
def adapter(write_adapter, tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter"), ranks=6)


def ranks_of(llm):
    return llm.engine.adapter_slots.ranks


def test_a_rank_takes_a_row_of_every_matrix(rank_bytes):
    # q, k, v: 32 -> 32, 8, 32; o: 64 -> 32; gate, up: 32 -> 48; down: 48 -> 32; two layers, float32, a router each
    outputs, inputs = 32 + 8 + 32 + 32 + 48 + 48 + 32, 32 * 3 + 64 + 32 * 2 + 48
    assert rank_bytes == 2 * (4 * (2 * inputs + outputs) + 4 * 7)


def test_room_is_what_was_asked_for(folder, adapter, rank_bytes):
    assert ranks_of(LLM(folder, adapters={"a": adapter}, adapter_bytes=7 * rank_bytes - 1)) == 6
    with pytest.raises(
        ValueError, match=rf"hold 5 ranks of {rank_bytes} bytes .*'a' has 6, which take {6 * rank_bytes}"
    ):
        LLM(folder, adapters={"a": adapter}, adapter_bytes=6 * rank_bytes - 1)
    with pytest.raises(ValueError, match=f"adapter_bytes=5 hold 0 ranks of {rank_bytes} bytes in this model$"):
        LLM(folder, adapters={}, adapter_bytes=5)


def test_room_is_a_tenth_of_free_memory_at_first(folder, adapter, rank_bytes, monkeypatch):
    for free, ranks in ((200 * rank_bytes, 20), (20 * rank_bytes, 6), (1 << 50, opening.USEFUL_RANKS)):
        monkeypatch.setattr(opening, "free_bytes", lambda device, free=free: free)
        assert ranks_of(LLM(folder, adapters={"a": adapter}, cache_bytes=1 << 20)) == ranks


def test_what_cannot_be_is_told_before_anything_runs(folder, adapter, tmp_path):
    with pytest.raises(ValueError, match="adapters run on one rank only, got tensor_parallel_size=2"):
        LLM(folder, adapters={}, tensor_parallel_size=2)
    with pytest.raises(ValueError, match="adapter_host_bytes must not be negative, got -1"):
        LLM(folder, adapters={}, adapter_host_bytes=-1)
    with pytest.raises(ValueError, match="no adapter folder at"):
        LLM(folder, adapters={"a": tmp_path / "nowhere"})


def test_what_comes_later_must_fit_in(folder, adapter, write_adapter, tmp_path, rank_bytes):
    llm = LLM(folder, adapters={}, adapter_bytes=5 * rank_bytes)
    with pytest.raises(ValueError, match="adapter 'a' has 6 ranks, there is room for 5: raise adapter_bytes"):
        llm.load_adapter("a", adapter)
    wide = write_adapter(tmp_path / "wide", ranks=64)
    with pytest.raises(ValueError, match=rf"bytes, allowed {4 * 5 * rank_bytes}"):
        llm.load_adapter("wide", wide)
    with pytest.raises(ValueError, match="there is no adapter 'a'"):
        llm.generate([[1, 2]], adapter="a")
