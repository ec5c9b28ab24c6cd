"""Adapters with routed ranks, and many adapters in one batch, beside torch and PEFT."""

from functools import lru_cache

import pytest
import torch

from anabranch.bench.rank_lora import ROWS, many_adapters, one_adapter
from anabranch.bench.timing import Case

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@lru_cache(maxsize=1)
def smora(T: int, dtype: torch.dtype, quick: bool) -> Case:
    width, ranks, copies = (64, 16, 2) if quick else (4096, 64, 8)
    return one_adapter(T, width=width, ranks=ranks, chosen=ranks // 8, dtype=dtype, copies=copies)


@lru_cache(maxsize=1)
def mixed(dtype: torch.dtype, quick: bool) -> Case:
    width, ranks, copies = (64, 4, 1) if quick else (4096, 16, 4)
    return many_adapters(32, width=width, ranks=ranks, adapters=16, dtype=dtype, copies=copies)[0]


@DTYPES
@pytest.mark.parametrize("contender", ["anabranch", "torch dense and mask"])
@pytest.mark.parametrize("T", ROWS, ids="T={}".format)
def test_smora(run, quick, T, contender, dtype):
    run(smora(T, dtype, quick), contender)


@DTYPES
@pytest.mark.parametrize("contender", ["anabranch", "gathered weights", "loop over adapters", "PEFT, mixed batch"])
def test_many_adapters(run, quick, contender, dtype):
    run(mixed(dtype, quick), contender)
