"""Coordinate-wise rules beside torch's sort and ByzFL."""

from functools import lru_cache

import pytest
import torch

from anabranch.bench.coordinate_rules import ELEMENTS, ROWS, RULES, coordinate_rules
from anabranch.bench.timing import Case


@lru_cache(maxsize=1)
def cases(N: int, D: int, dtype: torch.dtype) -> list[Case]:
    return coordinate_rules(N, D, dtype=dtype)[0]


@pytest.mark.parametrize("contender", ["anabranch", "torch sort"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", ROWS, ids="N={}".format)
def test_coordinate_rules(run, quick, N, dtype, rule, contender):
    run(cases(N, 1000 if quick else ELEMENTS // N, dtype)[RULES.index(rule)], contender)
