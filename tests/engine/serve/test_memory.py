from dataclasses import replace

import pytest
import torch

from anabranch.serve import memory
from anabranch.serve.memory import free_bytes, size_cache
from anabranch.serve.runner import cache_bytes_per_token


@pytest.fixture
def size(build):
    config = replace(build().config, max_position=1000)

    def run(**changes):
        settings = {
            "dtype": torch.bfloat16, "block_size": 16, "max_num_seqs": 4, "max_model_len": None, "cache_bytes": None,
            "device": torch.device("cpu"),
        }  # fmt: skip
        return size_cache(config, **{**settings, **changes})

    run.block_bytes = 16 * cache_bytes_per_token(config, torch.bfloat16)
    return run


def test_free_memory_is_what_the_system_or_the_container_grants(tmp_path, monkeypatch):
    system = free_bytes(torch.device("cpu"))
    assert 0 < system < 1 << 50
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    assert free_bytes(torch.device("cpu")) == 600
    (tmp_path / "memory.current").write_text("1400\n")
    assert free_bytes(torch.device("cpu")) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 1 << 20
    monkeypatch.setattr(memory, "GROUP", tmp_path / "absent")
    assert free_bytes(torch.device("cpu")) > 1 << 20


def test_half_of_a_small_memory_is_used(size, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * 100 * size.block_bytes)
    assert size() == (100, 1000)
    assert size(max_model_len=300) == (4 * 19, 300)  # four sequences cannot use more


def test_given_bytes_are_never_exceeded(size):
    assert size(cache_bytes=70 * size.block_bytes - 1) == (69, 1000)
    assert size(cache_bytes=20 * size.block_bytes) == (20, 320)  # a length that nobody asked for gives way
    with pytest.raises(ValueError, match="one sequence of 321 tokens needs 21: raise cache_bytes or lower"):
        size(cache_bytes=20 * size.block_bytes, max_model_len=321)


def test_ranks_count_the_heads_that_they_hold(size, monkeypatch):
    """Hk = 1 is repeated, Hv = 2 split: of 2 * (8 + 2 * 16) elements a token and layer two ranks hold 2 * (8 + 16)."""
    each = size.block_bytes * 24 // 40
    assert size(cache_bytes=20 * each, ranks=2) == (20, 320)
    assert size(cache_bytes=20 * each - 1, ranks=2)[0] == 19
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * 2 * 100 * each)
    assert size(ranks=2) == (100, 1000)  # half of the memory, shared by two


def test_gpus_have_memories_of_their_own(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    assert memory.cache_budget(torch.device("cuda"), 2) == 850
    assert memory.cache_budget(torch.device("cpu"), 2) == 250
