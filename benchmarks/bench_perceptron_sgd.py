"""An epoch of many small perceptrons beside torch's batched products and a plain loop."""

from functools import lru_cache

import pytest

from anabranch.bench.perceptron_sgd import local_epoch
from anabranch.bench.timing import Case

TASKS = {"digits": ((64, 64, 10), 100, 160, 16), "pictures": ((784, 128, 10), 10, 576, 32)}


@lru_cache(maxsize=1)
def case(task: str, quick: bool) -> Case:
    widths, N, n, batch = TASKS[task]
    return local_epoch(widths, N=2 if quick else N, n=batch if quick else n, batch=batch)


@pytest.mark.parametrize("contender", ["anabranch", "torch bmm", "torch loop"])
@pytest.mark.parametrize("task", TASKS)
def test_perceptron_sgd(run, quick, task, contender):
    run(case(task, quick), contender)
