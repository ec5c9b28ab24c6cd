"""Attention over a whole prompt beside torch's SDPA, with the K heads expanded before and inside the clock."""

from functools import lru_cache

import pytest
import torch

from anabranch.bench.attention import PREFILL, Shape, prefill
from anabranch.bench.timing import Case


@lru_cache(maxsize=1)
def case(tokens: int) -> Case:
    return prefill(tokens, shape=Shape(), dtype=torch.bfloat16)


@pytest.mark.parametrize("contender", PREFILL)
@pytest.mark.parametrize("tokens", [512, 2048], ids="T={}".format)
def test_prefill(run, quick, tokens, contender):
    run(case(48 if quick else tokens), contender)
