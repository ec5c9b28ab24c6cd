"""Contenders of the benchmark of adapters compute the same."""

import pytest
import torch

from anabranch.bench.rank_lora import exact_router, many_adapters, one_adapter
from anabranch.bench.timing import check_agreement

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("T", [1, 7])
def test_one_adapter(T, dtype):
    case = one_adapter(T, width=96, ranks=16, chosen=4, dtype=dtype, copies=2)
    check_agreement(case)
    assert [contender.name for contender in case.contenders] == ["anabranch", "torch dense and mask"]
    assert case.contenders[0].step().shape == (T, 96)
    assert case.calls == 2


@DTYPES
def test_many_adapters(dtype):
    case, absent = many_adapters(9, width=64, ranks=8, adapters=4, dtype=dtype, copies=2)
    check_agreement(case)
    names = {contender.name for contender in case.contenders}
    assert names == {"anabranch", "gathered weights", "loop over adapters", "PEFT, mixed batch"}
    assert absent == []


def test_scores_are_exact_and_all_different():
    random = torch.Generator().manual_seed(0)
    router, bias = exact_router(64, 4096, torch.bfloat16, random)
    x = torch.randn(50, 4096, generator=random).sign()
    exact = x.double() @ router.double().T
    assert torch.equal((x.bfloat16() @ router.T).double(), exact)
    scores = (exact.float().sigmoid() + bias).sort(1).values
    assert (scores.diff(dim=1) > 1e-6).all()
