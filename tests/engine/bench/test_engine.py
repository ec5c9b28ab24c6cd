"""Engines are compared on equal weights, and only when they agree on the next token."""

import pytest
import torch

from anabranch.bench.engine import LLAMA_315M, TINY, Load, count_weights, make_sample, measure_load, open_peers
from anabranch.bench.peer import Times
from anabranch.bench.timing import Roofs

ROOFS = Roofs(read=lambda: 1e9, flops=1e12)


class Fixed:
    """A peer with given answers."""

    def __init__(self, name, logprobs, seconds):
        self.name, self.answer, self.seconds, self.seen = name, logprobs, seconds, []

    def logprobs(self, prompt):
        return self.answer

    def generate(self, prompts, new_tokens):
        self.seen.append(prompts)
        return Times(prefill_s=self.seconds, decode_s=self.seconds * (new_tokens - 1))


def test_the_large_model_is_the_one_of_the_tables():
    assert round(count_weights(LLAMA_315M) / 1e6) == 315


def test_prompts_never_repeat_and_both_phases_are_reported():
    answer = torch.randn(TINY.vocab_size).log_softmax(0)
    peers = [Fixed("ours", answer, 0.5), Fixed("theirs", answer + 0.05, 1.0)]
    load = Load(batch=2, prompt=8, new_tokens=3)
    samples = measure_load(peers, TINY, load, ROOFS, repeats=4)
    assert [(one.contender, one.median_s) for one in samples] == [("ours", 0.5), ("theirs", 1.0)] * 2
    assert [one.case.split(",")[0] for one in samples] == ["prefill"] * 2 + ["decode"] * 2
    assert [one.tokens for one in samples] == [16, 16, 2, 2]
    prompts = [str(prompt) for peer in peers for batch in peer.seen for prompt in batch]
    assert len(set(prompts)) == len(prompts) == 2 * 2 * 5  # two peers, two sequences, warm-up and four repeats


def test_a_peer_with_other_weights_is_named():
    answer = torch.randn(TINY.vocab_size, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    peers = [Fixed("ours", answer, 1), Fixed("theirs", answer.roll(1), 1)]
    with pytest.raises(ValueError, match="theirs and ours differ by"):
        measure_load(peers, TINY, Load(batch=1, prompt=4, new_tokens=2), ROOFS, repeats=1)


def test_decode_reads_every_weight_once_and_every_cache():
    load = Load(batch=4, prompt=100, new_tokens=20)
    sample = make_sample("decode", "ours", [1.0], TINY, load, read_roof=1.0, flops_roof=1.0)
    cache = 2 * TINY.layers * (TINY.k_heads * TINY.k_dim + TINY.v_heads * TINY.v_dim)
    assert sample.read_bytes == 2 * count_weights(TINY) + 4 * 110 * cache
    assert sample.tokens == 4
    prefill = make_sample("prefill", "ours", [1.0], TINY, load, read_roof=1.0, flops_roof=1.0)
    assert prefill.read_bytes == 2 * count_weights(TINY)
    assert prefill.tokens == 400


def test_our_engine_and_transformers_agree_and_run():
    load = Load(batch=2, prompt=24, new_tokens=3)
    with open_peers(TINY, ["transformers"], load, threads=1) as (peers, absent):
        samples = measure_load(peers, TINY, load, ROOFS, repeats=1)
    assert absent == []
    assert [one.contender for one in samples] == ["anabranch", "transformers"] * 2
    assert all(one.median_s > 0 for one in samples)
