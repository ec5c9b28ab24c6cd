"""Geometric median, and the two reads it consists of, beside torch."""

from functools import lru_cache

import pytest
import torch

from anabranch.bench.geometric_median import CENTRED, cloud, medians
from anabranch.bench.timing import Case

KINDS = ("gram", "combine", "median")


@lru_cache(maxsize=1)
def cases(N: int, D: int, dtype: torch.dtype) -> list[Case]:
    return medians(cloud(N, D, dtype=dtype, data=CENTRED))


@pytest.mark.parametrize("index", [0, 1], ids=["anabranch", "torch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [8, 32, 128], ids="N={}".format)
def test_geometric_median(run, quick, N, dtype, kind, index):
    chosen = cases(N, 1000 if quick else 80_000_000 // N, dtype)[KINDS.index(kind)]
    run(chosen, chosen.contenders[index].name)
