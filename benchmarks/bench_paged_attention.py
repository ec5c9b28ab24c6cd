"""Paged decode of a DiffQKV layer beside its GQA twin and torch, from 2k to 32k tokens of context."""

from functools import lru_cache

import pytest
import torch

from anabranch.bench.attention import DECODE, Shape, decode
from anabranch.bench.timing import Case


@lru_cache(maxsize=1)  # contenders of one case run one after another; the next case needs the memory
def case(context: int, working_set: int) -> Case:
    return decode(context, shape=Shape(), dtype=torch.bfloat16, working_set=working_set)


@pytest.mark.parametrize("contender", DECODE)
@pytest.mark.parametrize("context", [2048, 8192, 32768], ids="S={}".format)
def test_decode(run, quick, working_set, context, contender):
    run(case(96 if quick else context, working_set), contender)
