"""Batches continue anywhere and visit everything; windows predict each token once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.data.stream import Batches, held_out_windows


def batches(n: int, context: int, batch: int, seed: int = 0) -> Batches:
    return Batches(stream=torch.arange(n, dtype=torch.int16), context=context, batch=batch, seed=seed)


@given(st.integers(0, 400), st.integers(1, 7), st.integers(1, 5), st.integers(0, 30), st.integers(0, 5))
def test_a_batch_is_a_run_of_the_stream_and_its_successors(more, context, batch, step, seed):
    source = batches(2 * context + 1 + more, context, batch, seed)
    inputs, targets = source.at(step)
    assert inputs.shape == targets.shape == (batch, context)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)  # the stream counts up
    again, _ = batches(2 * context + 1 + more, context, batch, seed).at(step)
    assert torch.equal(inputs, again)


def test_an_epoch_visits_each_window_once_and_the_next_in_another_order():
    source = batches(1000, 10, 7)
    rows = torch.cat([source.at(step)[0] for step in range(2 * source.windows // 7 + 1)])
    first, second = rows[: source.windows], rows[source.windows : 2 * source.windows]
    for epoch in (first, second):
        assert epoch.unique().numel() == epoch.numel()  # no token twice
        assert epoch.numel() >= 1000 - 3 * 10
    assert not torch.equal(first, second)


def test_seeds_give_different_batches():
    assert not torch.equal(batches(1000, 10, 7, seed=0).at(0)[0], batches(1000, 10, 7, seed=1).at(0)[0])


def test_text_shorter_than_the_context_is_refused():
    with pytest.raises(ValueError, match=r"shorter than the context: 20 tokens.* at least 21"):
        batches(20, 10, 1)


@given(st.integers(2, 60), st.integers(1, 17))
def test_held_out_windows_predict_each_token_once(n, context):
    stream = torch.randint(258, (n,)).to(torch.int16)
    inputs, targets = held_out_windows(stream, context)
    kept = targets.flatten() != -100
    assert torch.equal(targets.flatten()[kept], stream[1:].long())
    assert torch.equal(inputs.flatten()[kept], stream[:-1].long())


def test_a_limit_spreads_the_held_out_windows():
    inputs, _ = held_out_windows(torch.arange(101, dtype=torch.int16), 10, 5)
    assert inputs[:, 0].tolist() == [0, 20, 40, 60, 80]


def test_nothing_held_out_is_refused():
    with pytest.raises(ValueError, match="nothing to measure on"):
        held_out_windows(torch.zeros(1, dtype=torch.int16), 10)
