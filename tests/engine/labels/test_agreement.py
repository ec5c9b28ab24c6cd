"""Modes and entropies of predictions beside Python's own counting."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.labels.agreement import agreement


@given(st.integers(2, 6).flatmap(lambda C: st.tuples(st.just(C), st.lists(st.integers(0, C - 1), min_size=1))))
def test_counting(case):
    C, said = case
    mode, wavering = agreement(torch.tensor([[said, said[::-1]]], dtype=torch.int32), C)
    counts = Counter(said)
    expected = -sum(n / len(said) * math.log(n / len(said)) for n in counts.values()) / math.log(C)
    assert wavering[0].tolist() == pytest.approx([expected] * 2, abs=1e-6)
    assert mode[0].tolist() == [min(counts, key=lambda c: (-counts[c], c))] * 2


def test_of_fifteen_all_have_to_agree():
    said = torch.full((2, 15), 3)
    said[1, 4] = 5
    mode, wavering = agreement(said, 10)
    assert mode.tolist() == [3, 3]
    assert wavering[0] == 0
    assert wavering[1] > 0.05
