"""A weight matrix times a few rows beside torch's linear."""

from functools import lru_cache

import pytest
import torch

from anabranch.bench.linear import QUICK_SHAPES, ROWS, SHAPES, skinny
from anabranch.bench.timing import Case


@lru_cache(maxsize=1)
def cases(size: tuple[int, int], dtype: torch.dtype, working_set: int) -> list[Case]:
    return skinny(size, ROWS, dtype=dtype, working_set=working_set)


@pytest.mark.parametrize("index", [0, 1], ids=["anabranch", "torch"])
@pytest.mark.parametrize("rows", ROWS, ids="M={}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_linear(run, quick, working_set, size, dtype, rows, index):
    chosen = cases(QUICK_SHAPES[0] if quick else size, dtype, working_set)[ROWS.index(rows)]
    run(chosen, chosen.contenders[index].name)
