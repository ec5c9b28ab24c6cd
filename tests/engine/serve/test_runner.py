from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from anabranch.models.transformer import Transformer
from anabranch.serve.blocks import BlockPool
from anabranch.serve.runner import Runner, cache_bytes_per_token, decode_bytes
from anabranch.serve.scheduler import Scheduler, Sequence

# float32 through two layers, attention summed in another order: some 1e-6 of values of order one
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def run_all(model, prompts, *, max_num_batched_tokens, dtype=torch.float32, block_size=4):
    """Hidden states of each prompt, computed together in steps of so many tokens."""
    scheduler = Scheduler(
        BlockPool(64), block_size=block_size, max_num_seqs=4, max_num_batched_tokens=max_num_batched_tokens
    )
    runner = Runner(model, num_blocks=64, block_size=block_size, max_num_seqs=4, max_len=64, dtype=dtype)
    seqs = [Sequence(tokens=list(prompt), max_len=len(prompt) + 1) for prompt in prompts]
    found = {seq: [] for seq in seqs}
    for seq in seqs:
        scheduler.add(seq)
    while scheduler.waiting or scheduler.running:
        step = scheduler.schedule()
        with torch.inference_mode():
            hidden = runner.forward(step)
        scheduler.complete(step)
        for seq, part in zip(step.sequences, hidden.split(step.counts), strict=True):
            found[seq].append(part)
            if seq.computed == len(seq.tokens):
                scheduler.finish(seq)
    return [torch.cat(found[seq]) for seq in seqs]


@pytest.mark.parametrize("max_num_batched_tokens", [4, 7, 64])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_chunks_in_a_batch_equal_one_dense_pass(model, dense, max_num_batched_tokens, block_size):
    prompts = [[5] * 3, list(range(10, 33)), [40], list(range(50, 67))]
    found = run_all(model, prompts, max_num_batched_tokens=max_num_batched_tokens, block_size=block_size)
    for prompt, hidden in zip(prompts, found, strict=True):
        assert_close(hidden, dense(model, prompt), **CLOSE)


def test_windows_reach_the_kernel(build, dense):
    model = build(family="mistral", k_heads=2, v_heads=2, v_dim=8, windows=(5, 5))
    prompt = list(range(10, 40))
    (found,) = run_all(model, [prompt], max_num_batched_tokens=7)
    assert_close(found, dense(model, prompt), **CLOSE)


def test_an_int8_cache_comes_close(model, dense):
    prompt = list(range(10, 40))
    (found,) = run_all(model, [prompt], max_num_batched_tokens=7, dtype=torch.int8)
    exact = dense(model, prompt)
    # one step of 127 per element and layer; hidden states are normalised to order one
    assert (found - exact).abs().max() < 0.1
    assert (found - exact).abs().max() > 0  # it was really quantised


def test_only_wanted_logits_are_computed(model, dense):
    runner = Runner(model, num_blocks=4, block_size=4, max_num_seqs=1, max_len=16, dtype=torch.float32)
    hidden = dense(model, list(range(10, 20)))
    with torch.inference_mode():
        assert_close(runner.logits(hidden, [2, 9]), model.logits(hidden)[[2, 9]], **CLOSE)
        assert runner.logits(hidden, range(3, 5)).shape == (2, model.config.vocab_size)


def test_bytes_are_counted(build):
    model = build()
    config = model.config
    assert cache_bytes_per_token(config, torch.bfloat16) == 2 * 2 * (1 * 8 + 2 * 16)
    assert cache_bytes_per_token(config, torch.int8) == 2 * (1 * 8 + 2 * 16) + 2 * 4 * (1 + 2)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert decode_bytes(model, torch.float32, 10) == weights + 10 * cache_bytes_per_token(config, torch.float32)
    untied = build(tie_embeddings=False)
    assert decode_bytes(untied, torch.float32, 0) == weights  # one of the two matrices is only looked up
    windowed = build(family="mistral", k_heads=2, v_heads=2, v_dim=8, windows=(5, 5))
    per_token = cache_bytes_per_token(windowed.config, torch.float32)
    assert decode_bytes(windowed, torch.float32, 50) - decode_bytes(windowed, torch.float32, 0) == 5 * per_token


@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_read_half_of_the_output_matrix_each(build, tied):
    config = build(tie_embeddings=tied, vocab_size=98).config

    class Rank:
        rank, size = 0, 2

    part = Transformer(config, group=Rank(), device="meta")
    blocks = sum(parameter.nbytes for parameter in part.blocks.parameters()) + part.norm.nbytes
    assert decode_bytes(part, torch.float32, 0) == blocks + 49 * config.hidden_size * 4


def test_a_model_with_other_sizes_gets_other_pools(build):
    config = replace(build().config, k_heads=4, v_heads=1)
    model = build(k_heads=4, v_heads=1)
    runner = Runner(model, num_blocks=6, block_size=4, max_num_seqs=2, max_len=16, dtype=torch.int8)
    for cache in runner.caches:
        assert cache.k.shape == (6, config.k_heads, 4, config.k_dim)
        assert cache.v.shape == (6, config.v_heads, 4, config.v_dim)
        assert cache.k_scales is not None
        assert cache.k_scales.shape == (6, config.k_heads, 4)
