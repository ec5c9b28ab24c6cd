"""A mask is taken apart only into pieces that, put together again, are the mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.integrations.causal_runs import ROWS, Run, causal_runs


def causal(T, S, window=None):
    """[1, 1, T, S], aligned to the last key."""
    row, column = torch.arange(T)[:, None] + S - T, torch.arange(S)
    return ((column <= row) & (column > row - (window or S + 1)))[None, None]


def put_together(runs, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    for run in runs:
        for t in range(run.t0, run.t1):
            end = run.hi - (run.t1 - 1 - t)
            first = run.lo if run.window is None else max(run.lo, end - run.window)
            assert not mask[run.b0 : run.b1, :, t].any()  # no row is in two runs
            mask[run.b0 : run.b1, :, t, first:end] = True
    return mask


@st.composite
def masks(draw):
    """Sequences of one or several texts in one row, padded on both sides, under a window: what transformers makes."""
    B, T, cached = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.integers(0, 6))
    S = cached + T
    position = torch.arange(cached, S)[:, None]
    column = torch.arange(S)
    rows = []
    for _ in range(B):
        left = draw(st.integers(0, S))
        right = draw(st.integers(0, 3))
        text = (column >= draw(st.integers(0, S))).long() + (column >= draw(st.integers(0, S))).long()
        seen = (column <= position) & (column >= left) & (column < S - right) & (text == text[position])
        rows.append(seen & (column > position - draw(st.integers(1, S))) if draw(st.booleans()) else seen)
    return torch.stack(rows)[:, None]


@given(masks())
@settings(max_examples=300)
def test_the_runs_of_a_mask_make_that_mask(mask):
    runs = causal_runs(mask)
    assert runs is None or torch.equal(put_together(runs, mask.shape), mask)


@given(st.data())
@settings(max_examples=300)
def test_any_mask_is_taken_apart_rightly_or_not_at_all(data):
    B, T, S = (data.draw(st.integers(1, most)) for most in (2, 4, 5))
    bits = data.draw(st.lists(st.booleans(), min_size=B * T * S, max_size=B * T * S))
    mask = torch.tensor(bits).view(B, 1, T, S)
    runs = causal_runs(mask)
    assert runs is None or torch.equal(put_together(runs, mask.shape), mask)


def test_plain_causality_is_one_run():
    assert causal_runs(causal(3, 5).expand(4, -1, -1, -1)) == [Run(0, 4, 0, 3, 0, 5, None)]


def test_a_window_is_found():
    assert causal_runs(causal(8, 8, window=3)) == [Run(0, 1, 0, 8, 0, 8, 3)]
    assert causal_runs(causal(4, 9, window=3)) == [Run(0, 1, 0, 4, 3, 9, 3)]


def test_padding_cuts_rows_and_keys():
    mask = causal(6, 6).repeat(3, 1, 1, 1)
    mask[0, :, :, :2] = False  # padded on the left: two rows see nothing
    mask[2] = False
    assert causal_runs(mask) == [Run(0, 1, 2, 6, 2, 6, None), Run(1, 2, 0, 6, 0, 6, None)]


def test_packed_texts_are_runs_of_their_own():
    mask = causal(48, 48)
    mask[..., 20:, :20] = False
    assert causal_runs(mask) == [Run(0, 1, 0, 20, 0, 20, None), Run(0, 1, 20, 48, 20, 48, None)]


def test_one_new_token_each():
    mask = torch.zeros(3, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., :5] = mask[1, ..., 2:5] = mask[2, ..., 2:5] = True
    assert causal_runs(mask) == [Run(0, 1, 0, 1, 0, 5, None), Run(1, 3, 0, 1, 2, 5, None)]


def no_run(change):
    mask = causal(6, 6).clone()
    change(mask)
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        no_run(lambda mask: mask[..., 5, 2].fill_(False)),  # a hole
        no_run(lambda mask: mask[..., :3, :3].fill_(True)),  # a prefix seen both ways
        no_run(lambda mask: mask[..., 4:, :1].fill_(False)),  # a window that moves once
        torch.ones(1, 1, 6, 6, dtype=torch.bool),
        causal(6, 6).repeat(1, 2, 1, 1),  # a mask per head
        torch.eye(8, dtype=torch.bool)[None, None].roll(1, -1),  # what a row sees lies ahead, then far behind
    ],
)
def test_other_masks_have_no_runs(mask):
    assert causal_runs(mask) is None


def test_many_short_runs_are_not_worth_it():
    texts = torch.arange(4 * ROWS) // 4
    assert causal_runs(causal(4 * ROWS, 4 * ROWS) & (texts[:, None] == texts)) is None
