"""Small-loss selection beside a loop over the samples of each row."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.labels.selection import forget_rate, mean_of, small_losses


@given(
    rows=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 7.5]), min_size=6, max_size=6), min_size=1, max_size=4),
    real=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=4, max_size=4),
    percent=st.integers(0, 99),
)
def test_of_the_real_ones_the_smallest(rows, real, percent):
    mask = torch.tensor(real[: len(rows)])
    chosen = small_losses(torch.tensor(rows), mask, percent / 100)
    for losses, mine, row in zip(rows, mask.tolist(), chosen.tolist(), strict=True):
        own = [i for i in range(6) if mine[i]]
        kept = sorted(own, key=lambda i: losses[i])[: len(own) - percent * len(own) // 100]
        assert [i for i in range(6) if row[i]] == sorted(kept)


@pytest.mark.parametrize("large", [math.inf, math.nan])
def test_nothing_makes_it_choose_what_is_not_real(large):
    chosen = small_losses(torch.tensor([[0.0, large, large, 1.0]]), torch.tensor([[False, True, True, True]]), 0.0)
    assert not bool(chosen[0, 0])
    assert bool(chosen[0, 3])


def test_means():
    chosen = torch.tensor([[True, False, True], [False, False, False]])
    assert mean_of(chosen).tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]


def test_the_forget_rate_rises_to_its_end():
    rates = [forget_rate(time, rate=0.2, ramp=4) for time in range(7)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    assert forget_rate(0, rate=0.2, ramp=0) == 0.2
