"""Parts of models: which heads and rows a rank holds, and that the parts together are the whole.

Ranks are threads here: they run the same code as processes do, and meet at barriers.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from anabranch.common.checkpoint import Checkpoint
from anabranch.models.config import ModelConfig
from anabranch.models.shard import cut, split
from anabranch.models.transformer import DenseAttend, Transformer
from anabranch.models.weights import load_model, save_model

SIGMA = ModelConfig(
    family="sigma", vocab_size=61, hidden_size=48, ffn_size=81, layers=3, q_heads=12, k_heads=2, v_heads=6, k_dim=8,
    v_dim=8, max_position=64, q_intermediate_size=41,
)  # fmt: skip


class Meeting:
    """Where threads that play the ranks exchange tensors."""

    def __init__(self, size: int) -> None:
        self.barrier, self.brought = Barrier(size, timeout=60), [torch.empty(0)] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.brought[rank] = x.clone()
        self.barrier.wait()
        parts = list(self.brought)
        self.barrier.wait()
        return parts


class Rank:
    """A rank's end of a meeting, as the model sees it."""

    def __init__(self, meeting: Meeting, rank: int, size: int) -> None:
        self.meeting, self.rank, self.size = meeting, rank, size

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(torch.stack(self.meeting.exchange(self.rank, x)).sum(0))

    def gather(self, x: Tensor, total: int) -> Tensor:
        whole = torch.cat(self.meeting.exchange(self.rank, x), -1)
        assert whole.shape[1] == total
        return whole if self.rank == 0 else x


def whole(model: Transformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():  # per thread
        return model.logits(model(tokens, torch.arange(len(tokens)), DenseAttend(1)))


def together(folder: Path, size: int, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Logits on rank 0 of a model loaded and run by so many ranks."""
    meeting = Meeting(size)

    def run(rank: int) -> Tensor:
        return whole(load_model(folder, group=Rank(meeting, rank, size), dtype=dtype), tokens)

    with ThreadPoolExecutor(size) as threads:
        return next(iter(threads.map(run, range(size))))


def assert_equal_to_one_process(folder: Path, size: int, tokens: Tensor) -> None:
    expected = whole(load_model(folder), tokens)
    assert expected.std() > 0.5
    # Sums of at most 100 products in another order, nine times: about 3 * sqrt(100) * 2**-24 of the largest values.
    torch.testing.assert_close(
        together(folder, size, tokens), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize("Hq", range(1, 33))
def test_each_rank_reads_the_heads_that_the_whole_model_reads(Hq: int) -> None:
    """Every number of K heads and of ranks: what is accepted is right, what is refused cannot be said to an op."""
    for Hk in divisors(Hq):
        config = replace(SIGMA, q_heads=Hq, k_heads=Hk, v_heads=1, ffn_size=99, vocab_size=99, q_intermediate_size=None)
        for size in divisors(Hq):
            n = Hq // size
            read = [[i // (Hq // Hk) for i in range(rank * n, rank * n + n)] for rank in range(size)]
            runs = [{len(list(run)) for _, run in groupby(heads)} for heads in read]
            if any(len(lengths) > 1 for lengths in runs):
                assert size > 1
                assert Hk % size
                with pytest.raises(ValueError, match="unequally often"):
                    [cut(config, rank, size) for rank in range(size)]
                continue
            for rank, heads in enumerate(read):
                shard = cut(config, rank, size)
                local = shard.config
                assert list(shard.q_heads) == list(range(rank * n, rank * n + n))
                assert (local.q_heads, local.k_heads, local.v_heads) == (n, len(shard.k_heads), 1)
                assert [shard.k_heads[i * local.k_heads // local.q_heads] for i in range(n)] == heads
                if Hk % size == 0:
                    assert len(shard.k_heads) == Hk // size  # split
                if size % Hk == 0:
                    assert len(shard.k_heads) == 1  # repeated


def test_k_and_v_heads_are_cut_independently() -> None:
    sigma = replace(SIGMA, q_heads=32, k_heads=4, v_heads=16, vocab_size=64, ffn_size=64, q_intermediate_size=64)
    shards = [cut(sigma, rank, 8) for rank in range(8)]
    assert [list(shard.k_heads) for shard in shards] == [[0], [0], [1], [1], [2], [2], [3], [3]]
    assert [list(shard.v_heads) for shard in shards] == [[2 * rank, 2 * rank + 1] for rank in range(8)]
    # two K heads serve rank 1 with half a group each
    assert [list(cut(SIGMA, rank, 3).k_heads) for rank in range(3)] == [[0], [0, 1], [1]]


@pytest.mark.parametrize("size", range(1, 7))
@pytest.mark.parametrize("count", [36, 37, 41, 97, 128256])
def test_runs_cover_everything_once(count: int, size: int) -> None:
    runs = [split(count, rank, size) for rank in range(size)]
    assert [i for run in runs for i in run] == list(range(count))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_what_cannot_be_cut_is_named() -> None:
    with pytest.raises(ValueError, match="must divide the 12 query heads, got 5"):
        cut(SIGMA, 0, 5)
    with pytest.raises(
        ValueError, match="query heads 0 to 3 of one rank would read 2 of 4 K or V heads, which serve 3"
    ):
        cut(replace(SIGMA, k_heads=4), 0, 3)
    for name in ("ffn_size", "vocab_size", "q_intermediate_size"):
        with pytest.raises(ValueError, match=f"4 ranks cannot share {name}=3: each needs one at least"):
            cut(replace(SIGMA, **{name: 3}), 0, 4)
    with pytest.raises(ValueError, match=r"rank must be in \[0, size\), got rank=2, size=2"):
        cut(SIGMA, 2, 2)


def test_one_rank_holds_the_model() -> None:
    shard = cut(SIGMA, 0, 1)
    assert shard.config == shard.whole == SIGMA


@pytest.mark.parametrize(
    ("family", "changes", "size"),
    [
        ("llama", {}, 2),
        ("llama", {"num_key_value_heads": 6}, 6),
        ("llama", {"num_key_value_heads": 1}, 3),
        ("llama", {"num_key_value_heads": 2}, 3),  # two half groups on rank 1
        ("llama", {"attention_bias": True, "mlp_bias": True}, 2),  # o and down add theirs once
        ("llama", {"tie_word_embeddings": True, "intermediate_size": 77}, 3),
        ("mistral", {"sliding_window": 5}, 2),
        ("qwen2", {}, 2),
        ("qwen2", {"tie_word_embeddings": True}, 3),
        ("qwen3", {"head_dim": 16}, 2),
    ],
)
def test_ranks_give_the_logits_of_one_process(
    family: str, changes: dict[str, Any], size: int, make_checkpoint: Callable[..., Any], tokens: Tensor
) -> None:
    assert_equal_to_one_process(make_checkpoint(family, **changes)[0], size, tokens)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 2),
        ({}, 3),
        ({"augq_residual": True}, 6),
        ({"q_heads": 4, "k_heads": 1, "v_heads": 4}, 4),  # K repeated, V split
        ({"k_heads": 12, "v_heads": 1}, 4),  # K split, V repeated
        ({"k_dim": 4, "v_dim": 12, "q_intermediate_size": None}, 2),
        ({"tie_embeddings": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True}, 3),
    ],
)
def test_ranks_give_the_logits_of_one_sigma(
    changes: dict[str, Any], size: int, fill: Callable[..., None], tokens: Tensor, tmp_path: Path
) -> None:
    model = Transformer(replace(SIGMA, **changes))
    fill(model)
    save_model(model, tmp_path)
    assert_equal_to_one_process(tmp_path, size, tokens)


def test_bfloat16_rounds_once_more_for_each_rank(fill: Callable[..., None], tokens: Tensor, tmp_path: Path) -> None:
    model = Transformer(SIGMA)
    fill(model)
    save_model(model, tmp_path)
    exact = whole(model, tokens)
    one = whole(load_model(tmp_path, dtype=torch.bfloat16), tokens)
    two = together(tmp_path, 2, tokens, torch.bfloat16)
    # Rounding decides both distances from the float32 logits; a wrong sum would be off by the logits' own size.
    assert (two - exact).square().mean() < 3 * (one - exact).square().mean()


def test_a_part_is_not_saved_as_a_model(tmp_path: Path) -> None:
    part = Transformer(SIGMA, group=Rank(Meeting(2), 1, 2), device="meta")
    with pytest.raises(ValueError, match="only whole models are saved, got the part of rank 1 of 2"):
        save_model(part, tmp_path)


def test_weights_are_divided_not_repeated() -> None:
    """Beyond the embedding, q_proj for AugQ and norms, two ranks hold half of the weights each."""
    config = replace(SIGMA, ffn_size=80, q_intermediate_size=40, vocab_size=62)

    def matrices(model: Transformer) -> int:
        return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)

    model = Transformer(config, device="meta")
    repeated = model.embed.numel() + config.layers * config.q_width * config.hidden_size
    for rank in range(2):
        part = Transformer(config, device="meta", group=Rank(Meeting(2), rank, 2))
        assert matrices(part) - repeated == (matrices(model) - repeated) // 2


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_asks_the_file_for_its_own_part(
    rank: int, fill: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are mapped: what is not asked for is not read."""
    model = Transformer(SIGMA)
    fill(model)
    save_model(model, tmp_path)
    asked = []

    class Spy:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.dtype = tensor, tensor.dtype

        def __getitem__(self, part: Any) -> Tensor:
            asked.append(self.tensor[part].nbytes)
            return self.tensor[part]

    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: Spy(read(self, name)))
    part = load_model(tmp_path, group=Rank(Meeting(3), rank, 3))
    assert sum(asked) == sum(parameter.nbytes for parameter in part.parameters())
    assert sum(asked) < 0.5 * sum(parameter.nbytes for parameter in model.parameters())
