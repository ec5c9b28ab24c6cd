"""Engines are compared on equal weights, and only when they agree on the next token."""

import pytest
import torch

from anabranch.bench.engine import LLAMA_315M, TINY, count_weights, measure_decode, measure_prefill, open_peers, work
from anabranch.bench.timing import Roofs

ROOFS = Roofs(read=lambda: 1e9, flops=1e12)


class Fixed:
    """A peer with given answers."""

    def __init__(self, name, logprobs, seconds):
        self.name, self.answer, self.seconds, self.read, self.started = name, logprobs, seconds, [], []

    def logprobs(self, prompt):
        return self.answer

    def prefill(self, prompt):
        self.read.append(prompt)
        return self.seconds

    def start(self, prompts):
        self.started = prompts

    def decode(self, new_tokens):
        return self.seconds / new_tokens


def fixed_pair(shift=lambda answer: answer + 0.001):
    answer = torch.randn(TINY.vocab_size, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    return [Fixed("ours", answer, 0.5), Fixed("theirs", shift(answer), 1.0)]


def test_the_large_model_is_the_one_of_the_tables():
    assert round(count_weights(LLAMA_315M) / 1e6) == 315


def test_prompts_to_read_never_repeat():
    peers = fixed_pair()
    samples = measure_prefill(peers, TINY, ROOFS, prompt_tokens=8, repeats=4)
    assert [(one.contender, one.median_s, one.tokens) for one in samples] == [("ours", 0.5, 8), ("theirs", 1.0, 8)]
    prompts = [str(prompt) for peer in peers for prompt in peer.read]
    assert len(set(prompts)) == len(prompts) == 2 * 5  # two peers, warm-up and four repeats


def test_all_peers_decode_from_the_same_prompts():
    peers = fixed_pair()
    samples = measure_decode(peers, TINY, ROOFS, batch=3, context=8, new_tokens=2, repeats=4)
    assert [(one.contender, one.median_s, one.tokens) for one in samples] == [("ours", 0.25, 3), ("theirs", 0.5, 3)]
    assert peers[0].started == peers[1].started
    assert [len(prompt) for prompt in peers[0].started] == [8] * 3


def test_a_peer_with_other_weights_is_named():
    peers = fixed_pair(lambda answer: answer.roll(1))
    with pytest.raises(ValueError, match=r"theirs and ours differ .* by 1"):
        measure_prefill(peers, TINY, ROOFS, prompt_tokens=4, repeats=1)


def test_a_step_reads_every_weight_once_and_every_cache():
    cache = 2 * TINY.layers * (TINY.k_heads * TINY.k_dim + TINY.v_heads * TINY.v_dim)
    read_bytes, flops = work(TINY, batch=4, new_tokens=1, context=110)
    assert read_bytes == 2 * count_weights(TINY) + 4 * 110 * cache
    assert 4 * 2 * count_weights(TINY) < flops < 1.5 * 4 * 2 * count_weights(TINY)
    assert work(TINY, batch=1, new_tokens=100, context=0)[0] == 2 * count_weights(TINY)


def test_our_engine_and_transformers_agree_and_run():
    with open_peers(TINY, ["transformers"], batch=2, length=40, threads=1) as (peers, absent):
        samples = measure_prefill(peers, TINY, ROOFS, prompt_tokens=30, repeats=1)
        samples += measure_decode(peers, TINY, ROOFS, batch=2, context=30, new_tokens=3, repeats=2)
    assert absent == []
    assert [one.contender for one in samples] == ["anabranch", "transformers"] * 2
    assert all(one.median_s > 0 for one in samples)
