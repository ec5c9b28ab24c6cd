"""Contenders of the benchmark of growing ranks compute the same step, and the look does its work."""

import pytest
import torch

from anabranch.bench.timing import check_agreement
from anabranch.bench.triadapt import scoring, training_step

NAMES = ["anabranch TriAdapt", "anabranch LoRA", "dW made in every forward", "PEFT LoRA", "PEFT AdaLoRA"]


@pytest.mark.parametrize("base", [True, False])
def test_contenders_of_a_step_agree_again_and_again(base):
    case, absent = training_step(7, width=24, ranks=5, layers=3, base=base)
    first = case.contenders[0].step()
    for _ in range(2):
        check_agreement(case)
    assert [contender.name for contender in case.contenders] == NAMES
    assert absent == []
    assert torch.equal(case.contenders[0].step(), first)


def test_a_look_looks_and_nothing_grows():
    case, absent = scoring(width=16, ranks=4, layers=3)
    check_agreement(case)
    ours, theirs = (contender.step() for contender in case.contenders)
    assert (ours > 0).all()
    assert torch.equal(case.contenders[0].step(), ours)
    assert theirs.sum() == 3 * 4 - 3
    assert absent == []
