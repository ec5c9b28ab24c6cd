"""The coordinate-wise rules and their peers compute the same in every benchmark case."""

import sys

import pytest
import torch

from anabranch.bench.coordinate_rules import RULES, coordinate_rules
from anabranch.bench.timing import check_agreement


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [7, 8])
def test_contenders_agree(N, dtype):
    cases, _ = coordinate_rules(N, 500, dtype=dtype)
    assert [case.name.partition(" N=")[0] for case in cases] == list(RULES)
    for case in cases:
        assert [contender.name for contender in case.contenders][:2] == ["anabranch", "torch sort"]
        assert case.contenders[0].read_bytes == N * 500 * dtype.itemsize
        check_agreement(case)


def test_a_peer_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "byzfl", None)
    cases, absent = coordinate_rules(5, 10, dtype=torch.float32)
    assert len(absent) == len(cases)
    assert all("ByzFL: ModuleNotFoundError" in reason for reason in absent)
