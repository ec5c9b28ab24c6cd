"""What the ops ask of tensors: rows that are dense, wider dtypes, words for errors."""

import torch

from anabranch_kernels.tensors import dense_rows, described, sum_dtype, wide


def test_only_rows_with_gaps_are_copied():
    x = torch.arange(24.0).view(2, 3, 4)
    assert dense_rows(x[:, ::2]).data_ptr() == x.data_ptr()
    apart = x[..., ::2]
    assert dense_rows(apart).stride(-1) == 1
    assert torch.equal(dense_rows(apart), apart)


def test_dtypes_and_words():
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert (wide(x).dtype, sum_dtype(x), sum_dtype(wide(x))) == (torch.float64, torch.float32, torch.float64)
    assert described(x) == "[2, 3] torch.bfloat16 on cpu"
