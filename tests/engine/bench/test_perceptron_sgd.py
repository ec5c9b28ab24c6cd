"""The contenders of a local epoch agree."""

from itertools import pairwise

import pytest

from anabranch.bench.perceptron_sgd import local_epoch
from anabranch.bench.timing import check_agreement


@pytest.mark.parametrize("widths", [(9, 4), (16, 20, 5)])
def test_all_contenders_train_the_same(widths):
    case = local_epoch(widths, N=3, n=12, batch=4)
    assert [contender.name for contender in case.contenders] == ["anabranch", "torch bmm", "torch loop"]
    check_agreement(case)
    products = sum(a * b for a, b in pairwise(widths))
    assert case.contenders[0].flops == 2 * 36 * (3 * products - widths[0] * widths[1])
