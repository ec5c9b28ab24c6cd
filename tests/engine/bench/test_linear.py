"""skinny_linear and torch's linear compute the same in every benchmark case."""

import pytest
import torch

from anabranch.bench.linear import QUICK_SHAPES, ROWS, quantise, skinny
from anabranch.bench.timing import check_agreement


@pytest.mark.parametrize("size", QUICK_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_contenders_agree_for_every_number_of_rows(size, dtype):
    cases = skinny(size, ROWS, dtype=dtype, working_set=1)
    assert len(cases) == len(ROWS)
    for case, rows in zip(cases, ROWS, strict=True):
        check_agreement(case)
        assert case.contenders[0].step().shape == (rows, size[0])
        assert case.contenders[0].read_bytes == size[0] * size[1] * dtype.itemsize


def test_copies_fill_the_working_set():
    (case,) = skinny((8, 16), [1], dtype=torch.float32, working_set=5000)
    assert case.calls == 10
    assert case.contenders[0].read_bytes == 5120


def test_quantised_rows_are_within_half_a_step():
    weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    rows, scales = quantise(weight)
    assert rows.dtype == torch.int8
    assert (rows.abs().amax(1) == 127).all()
    assert ((rows * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()
